"""Imports MovieLens in every published layout (100K, 1M and 10M, 20M and 25M, RecBole) into the event schema.

The files in the folder determine the layout. ``datasets.ratings`` defines how a rating becomes events.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.datasets.columns import list_column
from reelway.pipelines.datasets.delimited import UTF8_OR_LATIN1, DelimitedFormat, file_line, read_delimited
from reelway.pipelines.datasets.film_content import split_title, text_embeddings, topics
from reelway.pipelines.datasets.ratings import Movies, Ratings, Users, ratings_to_tables
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import MalformedFileError

I64 = NDArray[np.int64]

_INT, _FLOAT, _TEXT = pa.int64(), pa.float64(), pa.string()
_GENRE_FLAGS: Final = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_AGES: Final = ((18, "under 18"), (25, "18-24"), (35, "25-34"), (45, "35-44"), (50, "45-49"), (56, "50-55"))
_OLDEST: Final = "56+"
_YEAR: Final = re.compile(r"[0-9]{1,4}")
_FIRST_TIME_S, _LAST_TIME_S = 0, 4_102_444_800  # 1970 to 2100


@dataclass(frozen=True)
class MovieLensLayout:
    """One published layout: the pattern of its ratings file, and its reader."""

    name: str
    ratings: str
    read: Callable[[Path], tuple[Ratings, Users | None, Movies]]


def import_movielens(folder: Path) -> tuple[dict[str, pa.Table], dict[str, Any]]:
    """Returns the five tables of the event schema and the data set's info.

    Raises:
        MalformedFileError: if no layout is recognised, or a file does not match its layout.
    """
    source = detect_layout(folder)
    ratings, people, movie_data = source.read(folder)
    tables, counts = ratings_to_tables(ratings, people, movie_data)
    return tables, {"name": "movielens", "source": f"MovieLens, {source.name}", "seed": None, **counts}


def files_of(folder: Path) -> list[Path]:
    """Returns the files that ``import_movielens`` reads, in a fixed order."""
    source = detect_layout(folder)
    names = {
        "u.data": ("u.data", "u.item", "u.user"),
        "ratings.dat": ("ratings.dat", "movies.dat", "users.dat"),
        "ratings.csv": ("ratings.csv", "movies.csv"),
    }.get(source.ratings)
    if names is None:
        inter = _recbole_file(folder, ".inter")
        return [path for path in (inter, inter.with_suffix(".item"), inter.with_suffix(".user")) if path.exists()]
    return [folder / name for name in names if (folder / name).exists()]


def detect_layout(folder: Path) -> MovieLensLayout:
    """Returns the layout of a folder.

    Raises:
        MalformedFileError: if the folder has no known layout.
    """
    for source in LAYOUTS:
        if _visible(folder, source.ratings):
            return source
    actual = sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else "no such folder"
    raise MalformedFileError(folder, f"a folder with one of {[s.ratings for s in LAYOUTS]}", seen=actual)


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Returns the matching files in order of name, without hidden files such as ``._ml.inter`` of macOS."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _read_ratings(path: Path, names: Sequence[str], *, delimiter: str, header: bool) -> Ratings:
    """Reads range-checked ratings from the columns viewer, video, rating, seconds."""
    types = dict(zip(names, (_INT, _INT, _FLOAT, _FLOAT), strict=True))
    layout = DelimitedFormat(
        types, delimiter=delimiter, header=header, ids=frozenset(names[:2]), quoted=header and delimiter == ","
    )
    table = read_delimited(path, layout)
    viewer, video, rating, time_s = (table[name].to_numpy() for name in names)
    for name, values, low, high in (
        (names[0], viewer, 0, MAX_ID),
        (names[1], video, 0, MAX_ID),
        (names[2], rating, 0.5, 5.0),
        (names[3], time_s, _FIRST_TIME_S, _LAST_TIME_S),
    ):
        bad = np.flatnonzero(~((values >= low) & (values <= high)))  # NaN is bad as well
        if len(bad):
            raise MalformedFileError(
                path,
                f"a number in {low}..{high}",
                seen=values[bad[0]].item(),
                row=file_line(path, layout, int(bad[0])),
                column=name,
            )
    return Ratings(viewer, video, rating.astype(np.float64), np.rint(time_s * 1e6).astype(np.int64))


def _distinct(path: Path, layout: DelimitedFormat, table: pa.Table, name: str) -> I64:
    ids: I64 = table[name].to_numpy()
    _, first = np.unique(ids, return_index=True)
    if len(first) != len(ids):
        row = int(np.setdiff1d(np.arange(len(ids)), first)[0])
        raise MalformedFileError(
            path, "an id that occurs once", seen=ids[row].item(), row=file_line(path, layout, row), column=name
        )
    return ids


def _movies(
    ids: I64,
    titles: Sequence[str | None],
    genres: Sequence[Sequence[str]],
    years: Sequence[int | None] | None = None,
) -> Movies:
    parts = [split_title(title or "") for title in titles]
    names = [name for name, _ in parts]
    if years is None:
        years = [year for _, year in parts]
    else:
        years = [listed_year or title_year for listed_year, (_, title_year) in zip(years, parts, strict=True)]
    shown = [f"{n} ({y})" if n and y else (n or None) for n, y in zip(names, years, strict=True)]
    text, known = text_embeddings(names, years, genres)
    return Movies(ids, topics(genres), pa.array(shown, pa.string()), list_column(text, known))


def _users(ids: I64, age: pa.ChunkedArray, gender: pa.ChunkedArray, zip_code: pa.ChunkedArray) -> Users:
    """Returns segments (age band and gender) and regions (first digit of a US postal code, a group of states)."""
    years = age.to_numpy()
    band = np.select([years < limit for limit, _ in _AGES], [name for _, name in _AGES], default=_OLDEST)
    segment = pc.binary_join_element_wise(pa.array(band.tolist(), pa.string()), _one(gender), "/")
    region = pc.if_else(
        pc.match_substring_regex(_one(zip_code), r"^\d{5}"),
        pc.binary_join_element_wise("us", pc.utf8_slice_codeunits(_one(zip_code), 0, 1), "-"),
        pa.scalar(None, pa.string()),
    )
    return Users(ids, region, segment)


def _one(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.cast(pa.string()).chunks) if column.num_chunks else pa.array([], pa.string())


def _read_100k(folder: Path) -> tuple[Ratings, Users | None, Movies]:
    columns = ("user id", "item id", "rating", "timestamp")
    ratings = _read_ratings(folder / "u.data", columns, delimiter="\t", header=False)
    head = {"movie id": _INT, "movie title": _TEXT, "release date": _TEXT, "video release date": _TEXT, "url": _TEXT}
    item_layout = DelimitedFormat(
        {**head, **{g: pa.int8() for g in _GENRE_FLAGS}}, delimiter="|", header=False, encoding=UTF8_OR_LATIN1,
        ids=frozenset({"movie id"}), optional=frozenset(list(head)[1:]), quoted=False,
    )  # fmt: skip
    items = read_delimited(folder / "u.item", item_layout)
    flags = np.column_stack([items[g].to_numpy() for g in _GENRE_FLAGS])
    genres = [[_GENRE_FLAGS[i] for i in np.flatnonzero(row)] for row in flags]
    ids = _distinct(folder / "u.item", item_layout, items, "movie id")
    return ratings, _read_100k_people(folder / "u.user"), _movies(ids, items["movie title"].to_pylist(), genres)


def _read_100k_people(path: Path) -> Users | None:
    if not path.exists():
        return None
    types = {"user id": _INT, "age": _INT, "gender": _TEXT, "occupation": _TEXT, "zip code": _TEXT}
    layout = DelimitedFormat(types, delimiter="|", header=False, ids=frozenset({"user id"}), quoted=False)
    users = read_delimited(path, layout)
    ids = _distinct(path, layout, users, "user id")
    return _users(ids, users["age"], users["gender"], users["zip code"])


def _read_dat(folder: Path) -> tuple[Ratings, Users | None, Movies]:
    columns = ("UserID", "MovieID", "Rating", "Timestamp")
    ratings = _read_ratings(folder / "ratings.dat", columns, delimiter="::", header=False)
    movies_path = folder / "movies.dat"
    layout = DelimitedFormat(
        {"MovieID": _INT, "Title": _TEXT, "Genres": _TEXT}, delimiter="::", header=False, ids=frozenset({"MovieID"}),
        encoding=UTF8_OR_LATIN1, quoted=False,
    )  # fmt: skip
    movies = read_delimited(movies_path, layout)
    ids = _distinct(movies_path, layout, movies, "MovieID")
    people = None
    if (users_path := folder / "users.dat").exists():
        types = {"UserID": _INT, "Gender": _TEXT, "Age": _INT, "Occupation": _INT, "Zip-code": _TEXT}
        users_layout = DelimitedFormat(
            types, delimiter="::", header=False, encoding=UTF8_OR_LATIN1, ids=frozenset({"UserID"}), quoted=False
        )
        users = read_delimited(users_path, users_layout)
        user_ids = _distinct(users_path, users_layout, users, "UserID")
        people = _users(user_ids, users["Age"], users["Gender"], users["Zip-code"])
    return ratings, people, _movies(ids, movies["Title"].to_pylist(), _split_genres(movies["Genres"], "|"))


def _read_csv(folder: Path) -> tuple[Ratings, Users | None, Movies]:
    columns = ("userId", "movieId", "rating", "timestamp")
    ratings = _read_ratings(folder / "ratings.csv", columns, delimiter=",", header=True)
    movies_path = folder / "movies.csv"
    layout = DelimitedFormat({"movieId": _INT, "title": _TEXT, "genres": _TEXT}, ids=frozenset({"movieId"}))
    movies = read_delimited(movies_path, layout)
    ids = _distinct(movies_path, layout, movies, "movieId")
    return ratings, None, _movies(ids, movies["title"].to_pylist(), _split_genres(movies["genres"], "|"))


def _recbole_file(folder: Path, suffix: str) -> Path:
    files = _visible(folder, f"*{suffix}")
    if len(files) != 1:
        expected = f"one *{suffix} file; put the lines of all parts in one file, below one header"
        raise MalformedFileError(folder, expected, seen=[p.name for p in files])
    return files[0]


def _read_recbole(folder: Path) -> tuple[Ratings, Users | None, Movies]:
    path = _recbole_file(folder, ".inter")
    columns = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
    ratings = _read_ratings(path, columns, delimiter="\t", header=True)

    items_path = path.with_suffix(".item")
    optional = frozenset({"movie_title:token_seq", "release_year:token", "class:token_seq", "genre:token_seq"})
    layout = DelimitedFormat(
        {"item_id:token": _INT} | dict.fromkeys(sorted(optional), _TEXT), delimiter="\t", optional=optional,
        ids=frozenset({"item_id:token"}), quoted=False,
    )  # fmt: skip
    items = read_delimited(items_path, layout)
    ids = _distinct(items_path, layout, items, "item_id:token")
    genres = "class:token_seq" if "class:token_seq" in items.column_names else "genre:token_seq"
    years = [int(y) if y and _YEAR.fullmatch(y) else None for y in _texts(items, "release_year:token")]
    movie_data = _movies(
        ids, _texts(items, "movie_title:token_seq"), [(g or "").split() for g in _texts(items, genres)], years
    )

    people, users_path = None, path.with_suffix(".user")
    if users_path.exists():
        types = {"user_id:token": _INT, "age:token": _INT, "gender:token": _TEXT, "zip_code:token": _TEXT}
        users_layout = DelimitedFormat(types, delimiter="\t", ids=frozenset({"user_id:token"}), quoted=False)
        users = read_delimited(users_path, users_layout)
        user_ids = _distinct(users_path, users_layout, users, "user_id:token")
        people = _users(user_ids, users["age:token"], users["gender:token"], users["zip_code:token"])
    return ratings, people, movie_data


def _texts(table: pa.Table, name: str) -> list[str | None]:
    if name not in table.column_names:
        return [None] * table.num_rows
    texts: list[str | None] = table[name].to_pylist()
    return texts


def _split_genres(column: pa.ChunkedArray, mark: str) -> list[list[str]]:
    return [value.split(mark) for value in column.to_pylist()]


LAYOUTS: Final = (
    MovieLensLayout("100K layout", "u.data", _read_100k),
    MovieLensLayout("1M and 10M layout", "ratings.dat", _read_dat),
    MovieLensLayout("20M and 25M layout", "ratings.csv", _read_csv),
    MovieLensLayout("RecBole layout", "*.inter", _read_recbole),
)
