"""Tiny files in published layouts: four users, three movies, eight ratings."""

from __future__ import annotations

from pathlib import Path

RATINGS = [  # user, movie, stars, seconds
    (1, 10, 5, 880000000),
    (1, 20, 1, 880000000),
    (2, 10, 4, 880000005),
    (2, 30, 3, 880000005),
    (3, 20, 2, 880000060),
    (3, 30, 4, 880000061),
    (4, 10, 3, 880086400),
    (4, 20, 5, 880086401),
]
_FLAGS = {10: "0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0", 20: "0|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0|1|0|0",
          30: "1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0"}  # fmt: skip


def ml_100k(folder: Path) -> Path:
    _write(folder / "u.data", "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in RATINGS))
    _write(
        folder / "u.item",
        f"10|Toy Story (1995)|01-Jan-1995||http://x?Toy%20Story|{_FLAGS[10]}\n"
        f'20|Café "Noir" (1996)|01-Jan-1996||http://x|{_FLAGS[20]}\n'
        f"30|unknown||||{_FLAGS[30]}\n",
        "latin-1",
    )
    _write(folder / "u.user", "1|24|M|technician|85711\n2|53|F|other|94043\n3|17|M|student|T8H1N\n4|60|F|none|01234\n")
    return folder


def ml_1m(folder: Path) -> Path:
    _write(folder / "ratings.dat", "".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in RATINGS))
    _write(
        folder / "movies.dat",
        '10::Toy Story (1995)::Animation|Children\'s|Comedy\n20::Café "Noir" (1996)::Action|Adventure|Thriller\n'
        "30::Nothing Known::(no genres listed)\n",
        "latin-1",
    )
    _write(folder / "users.dat", "1::M::25::12::85711\n2::F::50::0::94043-1234\n3::M::1::4::T8H\n4::F::56::6::01234\n")
    return folder


def ml_10m(folder: Path) -> Path:
    """The files of 1M in UTF-8 and without users, as 10M is published."""
    ml_1m(folder)
    (folder / "users.dat").unlink()
    path = folder / "movies.dat"
    path.write_bytes(path.read_bytes().decode("latin-1").encode())
    return folder


def ml_25m(folder: Path) -> Path:
    _write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n"
           + "".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in RATINGS))  # fmt: skip
    _write(
        folder / "movies.csv",
        'movieId,title,genres\n10,Toy Story (1995),Animation|Children|Comedy\n'
        '20,"Café, ""Noir"" (1996)",Action|Adventure|Thriller\n30,Nothing Known,(no genres listed)\n'
        "40,Never Rated (2001),Drama\n",
    )  # fmt: skip
    return folder


def recbole(folder: Path) -> Path:
    _write(folder / "ml.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
           + "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in RATINGS))  # fmt: skip
    _write(
        folder / "ml.item",
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '10\tToy Story\t1995\tAnimation Children\'s Comedy\n20\tCafé "Noir"\t1996\tAction Adventure Thriller\n'
        "30\tunknown\t\tunknown\n",
    )
    _write(
        folder / "ml.user",
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\t94043\n3\t17\tM\tstudent\tT8H1N\n4\t60\tF\tnone\t01234\n",
    )
    return folder


def kuairand(folder: Path) -> Path:
    head = ("user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
            "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n")  # fmt: skip
    _write(
        folder / "log_standard_4_08_to_4_21_pure.csv",
        head
        + "0,100,20220408,400,1649390000000,1,1,0,0,1,0,1,20000,18000,0,0,0,0,1\n"
        + "1,101,20220408,500,1649393600000,0,0,0,0,0,1,0,900,30000,0,0,0,0,1\n",
    )
    _write(
        folder / "log_random_4_22_to_5_08_pure.csv",
        head + "0,101,20220422,400,1650599601301,1,0,1,1,0,0,0,9000,30000,0,0,1,1,4\n",
    )
    _write(
        folder / "user_features_pure.csv",
        "user_id,user_active_degree,is_lowactive_period,register_days,onehot_feat0\n0,full_active,0,30,1\n"
        "1,high_active,0,,0\n",
    )
    _write(
        folder / "video_features_basic_pure.csv",
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
        'music_id,music_type,tag\n100,441,NORMAL,2022-04-01,ShortImport,1,18000.0,720,1280,9,4,"12,65"\n'
        "101,7,NORMAL,,ShortImport,1,,720,1280,9,4,\n102,7,AD,2022-04-01,X,1,5000.0,720,1280,9,4,40\n",
    )
    return folder


def _write(path: Path, text: str, encoding: str = "utf8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
