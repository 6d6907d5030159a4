import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.support.pipelines import published_formats as formats

from reelway.pipelines.datasets.checks import RATING_LIMITS, check_dataset
from reelway.pipelines.datasets.content_dimensions import infer_dimensions
from reelway.pipelines.datasets.film_content import GENRES, TEXT_DIM, text_embeddings
from reelway.pipelines.datasets.movielens import files_of, import_movielens
from reelway.pipelines.datasets.store import Dataset, cast_to_schema
from reelway.platform.contracts.events import DATASET_TABLES
from reelway.platform.errors import MalformedFileError

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "100K": formats.ml_100k,
    "1M": formats.ml_1m,
    "10M": formats.ml_10m,
    "25M": formats.ml_25m,
    "RecBole": formats.recbole,
}


@pytest.fixture(params=LAYOUTS)
def imported(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, pa.Table]:
    tables, _ = import_movielens(LAYOUTS[request.param](tmp_path))
    return tables


def test_every_layout_gives_the_same_impressions(imported: dict[str, pa.Table]) -> None:
    shown = imported["impressions"]
    seconds = pc.divide(shown["event_time"].cast(pa.int64()), 1_000_000)
    got = list(zip(shown["viewer_id"].to_pylist(), shown["video_id"].to_pylist(), seconds.to_pylist(), strict=True))
    assert got == [(u, i, t) for u, i, _, t in formats.RATINGS]
    assert shown["impression_id"].to_pylist() == list(range(8))
    assert set(shown["source"].to_pylist()) == {"import"}


def test_every_layout_passes_the_checks(imported: dict[str, pa.Table]) -> None:
    tables = {name: cast_to_schema(Path(name), imported[name], name) for name in DATASET_TABLES}
    checked = check_dataset(Dataset(**tables, info={}, dimensions=infer_dimensions(tables)), RATING_LIMITS)
    assert checked.rejected_rows == 0


def test_stars_become_outcomes_after_the_impression(imported: dict[str, pa.Table]) -> None:
    outcomes, shown = imported["outcomes"], imported["impressions"]
    assert Counter(outcomes["type"].to_pylist()) == {"watch": 8, "like": 4, "not_interested": 1}
    shown_at = shown["event_time"].cast(pa.int64()).to_numpy()[outcomes["impression_id"].to_numpy()]
    assert (outcomes["event_time"].cast(pa.int64()).to_numpy() > shown_at).all()
    not_interested = outcomes.filter(pc.equal(outcomes["type"].cast(pa.string()), "not_interested"))
    assert (not_interested["viewer_id"].to_pylist(), not_interested["video_id"].to_pylist()) == ([1], [20])


def test_movies_have_topic_title_upload_time_text(imported: dict[str, pa.Table]) -> None:
    films = {row["video_id"]: row for row in imported["videos"].to_pylist()}
    assert films[10]["title"] == "Toy Story (1995)"
    assert GENRES[films[10]["topic"]] == "Animation"
    assert GENRES[films[20]["topic"]] == "Action"
    assert films[30]["topic"] == -1
    assert films[20]["title"].removesuffix(" (1996)") in ('Café "Noir"', 'Café, "Noir"')
    assert films[30]["uploaded_at"].timestamp() == 880000005
    for row in films.values():
        assert np.linalg.norm(row["text"]) == pytest.approx(1.0, abs=1e-6)
        assert len(row["text"]) == TEXT_DIM
    assert 40 not in films


def test_viewers_begin_with_their_first_rating(imported: dict[str, pa.Table]) -> None:
    created = [t.timestamp() for t in imported["viewers"]["created_at"].to_pylist()]
    assert created == [880000000, 880000005, 880000060, 880086400]


def test_user_columns_become_segment_or_region(tmp_path: Path) -> None:
    tables, _ = import_movielens(formats.ml_100k(tmp_path))
    assert tables["viewers"]["segment"].to_pylist() == ["18-24/M", "50-55/F", "under 18/M", "56+/F"]
    assert tables["viewers"]["region"].to_pylist() == ["us-8", "us-9", None, "us-0"]


def test_movie_without_ratings_is_counted(tmp_path: Path) -> None:
    tables, info = import_movielens(formats.ml_25m(tmp_path))
    assert tables["videos"].num_rows == 3
    assert info["videos_without_events"] == 1


def test_text_embedding_encodes_genre_decade_words() -> None:
    titles, years, genres = (
        ["Alien", "Aliens", "Alien", ""],
        [1979, 1986, 1979, None],
        [["Horror"], ["Sci-Fi"], ["Horror"], []],
    )
    first, known = text_embeddings(titles, years, genres)
    again, _ = text_embeddings(titles, years, genres)
    assert np.array_equal(first, again)
    assert known.tolist() == [True, True, True, False]
    assert first[0] @ first[2] == pytest.approx(1.0, abs=1e-6)
    assert first[0] @ first[1] < 0.6


@pytest.mark.parametrize(
    ("make", "file", "old", "new", "message"),
    [
        (formats.ml_100k, "u.data", "2\t10\t4", "2\t10\tfour", r"u\.data, row 3, column 'rating': saw 'four'"),
        (formats.ml_100k, "u.data", "2\t10\t4", "2\t10\t7", r"u\.data, row 3, column 'rating': saw 7\.0, expected"),
        (formats.ml_100k, "u.data", "2\t10\t4", "2\t10", r"u\.data, row 3: saw '2\\t10\\t880000005', expected 4"),
        (formats.ml_1m, "ratings.dat", "3::20", "-3::20", r"ratings\.dat, row 5, column 'UserID': saw -3"),
        (formats.ml_25m, "ratings.csv", "movieId", "film", r"ratings\.csv, row 1, column 'movieId'"),
        (formats.ml_25m, "ratings.csv", "4,10,3.0", "4,,3.0", r"ratings\.csv, row 8, column 'movieId': saw"),
        (formats.ml_25m, "movies.csv", "30,Nothing", "10,Nothing", r"movies\.csv, row 4, column 'movieId': saw 10"),
        (formats.ml_100k, "u.data", "2\t10\t4", "\n\n2\t10\t9", r"u\.data, row 5, column 'rating': saw 9\.0"),
        (formats.ml_100k, "u.data", "2\t10\t4", "02\t10\t4", r"u\.data, row 3, column 'user id': saw '02'"),
        (formats.ml_1m, "movies.dat", "20::Caf", "020::Caf", r"movies\.dat, row 2, column 'MovieID': saw '020'"),
        (formats.ml_25m, "movies.csv", "30,Nothing", "\n10,Nothing", r"movies\.csv, row 5, column 'movieId': saw 10"),
        (formats.ml_25m, "ratings.csv", "4,10,3.0", "4,+10,3.0", r"ratings\.csv, row 8, column 'movieId': saw '\+10'"),
        (formats.recbole, "ml.inter", "4\t10\t3", "4\tA1\t3", r"row 8, column 'item_id:token': saw 'A1'"),
        (formats.recbole, "ml.user", "4\t60", "04\t60", r"ml\.user, row 5, column 'user_id:token': saw '04'"),
        (formats.recbole, "ml.inter", "880086400", "yesterday", r"ml\.inter, row 8, column 'timestamp:float': saw"),
        (formats.recbole, "ml.item", "item_id:token", "id", r"ml\.item, row 1, column 'item_id:token'"),
    ],
)  # fmt: skip
def test_malformed_file_error_names_the_value(
    tmp_path: Path, make: Callable[[Path], Path], file: str, old: str, new: str, message: str
) -> None:
    path = make(tmp_path) / file
    text = path.read_bytes()
    assert old.encode() in text
    path.write_bytes(text.replace(old.encode(), new.encode(), 1))
    with pytest.raises(MalformedFileError, match=message):
        import_movielens(tmp_path)


def test_folder_without_a_known_layout_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(MalformedFileError, match=r"readme\.txt.*u\.data"):
        import_movielens(tmp_path)


def test_empty_file_is_rejected(tmp_path: Path) -> None:
    (formats.ml_100k(tmp_path) / "u.data").write_text("\n")
    with pytest.raises(MalformedFileError, match="an empty file"):
        import_movielens(tmp_path)


def test_input_files_are_the_files_that_are_read(tmp_path: Path) -> None:
    assert [p.name for p in files_of(formats.recbole(tmp_path))] == ["ml.inter", "ml.item", "ml.user"]


def test_real_ml_100k_is_imported_completely() -> None:
    beside = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "ml-100k"
    folder = Path(os.environ.get("REELWAY_ML100K_DIR", beside))
    if not folder.is_dir():
        pytest.skip(f"MovieLens-100K is not at {folder}; set REELWAY_ML100K_DIR")
    tables, info = import_movielens(folder)
    assert {name: table.num_rows for name, table in tables.items() if name != "outcomes"} == {
        "viewers": 943, "creators": 1, "videos": 1682, "impressions": 100_000,
    }  # fmt: skip
    counts = Counter(tables["outcomes"]["type"].to_pylist())
    assert counts == {"watch": 100_000, "like": 55_375, "not_interested": 6_110}
    assert (
        check_dataset(Dataset(**tables, info=info, dimensions=infer_dimensions(tables)), RATING_LIMITS).rejected_rows
        == 0
    )
