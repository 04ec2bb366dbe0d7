"""Search a published index with images.

  python -m jobs.search IMAGE... --index URI@alias -k 8
  python -m jobs.search IMAGE... --index URI@alias --gallery out.html
  python -m jobs.search IMAGE... --index URI@alias --json
  python -m jobs.search IMAGE... --index URI@alias --view PA --sex F --age-from 40 --any-of Mass --any-of Nodule
  python -m jobs.search IMAGE --index URI@alias --region 300,420,250,250
  python -m jobs.search --id 00000001_000.png --index URI@alias

Needs no cluster: the version's files are fetched once, verified and mapped. Filters are applied inside the search, so
that as many hits come as were asked for, wherever so many images pass. The query's own patient is left out where the
query is an indexed image; `--patient` names one to leave out besides. With `--one-per-patient` every hit is another
patient.
"""

import argparse
import datetime
import json
from dataclasses import asdict

from cxr_retrieval import command, console, storage
from cxr_retrieval.config import SearchSettings, Settings
from cxr_retrieval.corpus.decoding import RejectedImage
from cxr_retrieval.corpus.findings import NO_FINDING
from cxr_retrieval.errors import UserError
from cxr_retrieval.index.filters import EVERYTHING, Filters
from cxr_retrieval.index.search import Answer, Query, Retriever
from cxr_retrieval.index.versions import split_reference
from cxr_retrieval.report.gallery import Case, Hit, PageFacts, QueryResult, write_gallery


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index", required=True, metavar="URI@alias", help="published index, and an alias or version of it"
    )
    parser.add_argument("-k", type=int, help="hits of one query (search.k)")
    parser.add_argument(
        "--one-per-patient", action="store_true", help="find patients, each by the nearest of their images"
    )
    parser.add_argument("--patient", help="patient to leave out, as the index knows them")
    parser.add_argument("--gallery", metavar="FILE", help="write the result as a page that opens offline")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--id", action="append", default=[], help="search with an indexed image, by its id; repeatable")
    parser.add_argument(
        "--region", type=_region, metavar="X,Y,W,H", help="look closely at this box, in pixels of IMAGE"
    )
    parser.add_argument("--view", action="append", default=[], help="find images of this view only; repeatable")
    parser.add_argument("--sex", help="find images of patients of this sex only")
    parser.add_argument("--age-from", type=int, metavar="YEARS", help="find patients of at least this age")
    parser.add_argument("--age-to", type=int, metavar="YEARS", help="find patients of at most this age")
    parser.add_argument("--date-from", type=_date, metavar="YYYY-MM-DD", help="find studies of this date or later")
    parser.add_argument("--date-to", type=_date, metavar="YYYY-MM-DD", help="find studies of this date or earlier")
    for name, what in (("any", "at least one of these"), ("all", "each of these"), ("none", "none of these")):
        parser.add_argument(
            f"--{name}-of",
            action="append",
            default=[],
            metavar="FINDING",
            help=f"find images that have {what} findings; repeatable",
        )


def implied(options: argparse.Namespace) -> list[str]:
    asked = [f"search.k={options.k}"] if options.k is not None else []
    return asked + ["search.one_per_patient=true"] * options.one_per_patient


def run(settings: Settings, options: argparse.Namespace) -> None:
    command.refuse_relative({"--gallery": options.gallery} if options.gallery else {})
    if not options.rest and not options.id:
        raise UserError("no image to search with: python -m jobs.search IMAGE... --index URI@alias")
    if options.region and (options.id or len(options.rest) > 1):
        raise UserError("--region is a box of one image: give one image file and no --id")
    retriever = Retriever.open(options.index)
    filters = Filters(
        views=tuple(options.view),
        sex=options.sex,
        age_from=options.age_from,
        age_to=options.age_to,
        date_from=options.date_from,
        date_to=options.date_to,
        any_of=tuple(options.any_of),
        all_of=tuple(options.all_of),
        none_of=tuple(options.none_of),
    )
    queries = [(image, read_query(retriever, image, options.region)) for image in options.rest]
    queries += [(image_id, retriever.query_of(image_id)) for image_id in options.id]
    found: list[tuple[str, Query, Answer]] = []
    for image, query in queries:
        answer = find(retriever, query, settings.search, filters, options.patient)
        found.append((image, query, answer))
    if options.json:
        console.out.print_json(json.dumps([_record(image, query, answer) for image, query, answer in found]))
    else:
        for image, _, answer in found:
            show_answer(image, answer)
    if options.gallery:
        page = gallery(retriever, options.index, found)
        storage.write_bytes(options.gallery, page.encode())
        console.say(f"gallery: {storage.canonical(options.gallery)}")


def find(
    retriever: Retriever,
    query: Query,
    settings: SearchSettings,
    filters: Filters = EVERYTHING,
    exclude_patient: str | None = None,
) -> Answer:
    """Search as the settings say."""
    return retriever.search(
        query,
        settings.k,
        filters,
        exclude_patient=exclude_patient,
        exclude_own=settings.exclude_own_patient,
        one_per_patient=settings.one_per_patient,
    )


def read_query(retriever: Retriever, image: str, region: tuple[float, float, float, float] | None = None) -> Query:
    """The query for an image file. Raises UserError for a file that is not there or cannot be decoded."""
    try:
        return retriever.query(storage.read_bytes(image), region)
    except FileNotFoundError:
        raise UserError(f"{image}: there is no such file; of a folder, name the images in it") from None
    except RejectedImage as rejected:
        raise UserError(f"{image} cannot be searched with: {rejected}") from None


def show_answer(image: str, answer: Answer) -> None:
    """Print the hits of one query; findings that it shares with the query's known ones are marked."""
    own = answer.known.findings if answer.known else ()
    rows = [
        [
            case.rank,
            f"{case.distance:.3f}",
            " ".join(name + "*" * (name in case.shared) for name in case.findings) or NO_FINDING,
            case.view or "",
            case.sex or "",
            case.age_years if case.age_years is not None else "",
            case.patient,
            case.image_id,
        ]
        for case in answer.cases
    ]
    known = f"{', '.join(own)} (* shared)" if own else "no finding"
    title = f"{image}: {known}" if answer.known else image
    console.show_table(title, ["rank", "distance", "findings", "view", "sex", "age", "patient", "image"], rows)
    if answer.warning:
        console.say(f"{image}: {answer.warning}")


def gallery(retriever: Retriever, reference: str, found: list[tuple[str, Query, Answer]]) -> str:
    """The page of all queries and their hits."""
    facts = retriever.facts
    page = PageFacts(
        index=split_reference(reference)[0].rpartition("/")[2],
        version=retriever.version.version.id,
        alias=split_reference(reference)[1],
        embedding=facts["embedding"],
        indexed_images=retriever.images,
        model=facts["model"],
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    size = retriever.model.recipe.size
    results: list[QueryResult] = []
    for image, query, answer in found:
        known = answer.known
        own = known.findings if known else ()
        # A file's name may be a patient's: a page of a pseudonymised index has the names that the index knows.
        name = image.rpartition("/")[2]
        if facts["pseudonymised"]:
            name = known.image_id if known else f"query {len(results) + 1}"
        case = Case(
            image_id=name,
            findings=own,
            view=known.view if known else None,
            age_years=known.age_years if known else None,
            sex=known.sex if known else None,
            patient=known.patient if known else "not in this index",
            study_date=known.study_date if known else None,
            pixels=query.pixels,
            crop=query.crop,
            image_size=size,
        )
        hits = tuple(
            Hit(
                Case(
                    hit.image_id,
                    hit.findings,
                    hit.view,
                    hit.age_years,
                    hit.sex,
                    hit.patient,
                    hit.study_date,
                    retriever.thumbnail(hit),
                    hit.crop,
                    size,
                ),
                hit.rank,
                hit.distance,
                hit.shared,
            )
            for hit in answer.cases
        )
        warning = f"{answer.warning[0].upper()}{answer.warning[1:]}." if answer.warning else None
        results.append(QueryResult(name, case, hits, warning, query.scores))
    return write_gallery(results, page)


def _record(image: str, query: Query, answer: Answer) -> dict[str, object]:
    return {
        "image": image,
        "known_as": answer.known.image_id if answer.known else None,
        "findings": answer.known.findings if answer.known else (),
        "scores": {name: round(score, 4) for name, score in query.scores.items()},
        "crop": query.crop,
        "passing": answer.passing,
        "nothing_similar": answer.nothing_similar,
        "warning": answer.warning,
        "hits": [asdict(case) for case in answer.cases],
    }


def _region(text: str) -> tuple[float, float, float, float]:
    try:
        x, y, w, h = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no box: write X,Y,W,H in pixels of IMAGE") from None
    return x, y, w, h


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date: write YYYY-MM-DD") from None


def plan(settings: Settings, options: argparse.Namespace) -> None:
    retriever = Retriever.open(options.index)
    console.show_table(
        "Plan of search",
        ["images", "hits of each", "indexed", "shards"],
        [[len(options.rest), settings.search.k, retriever.images, retriever.facts["shards"]]],
    )


if __name__ == "__main__":
    command.run("search", __doc__, run, plan, arguments, words="images", on_cluster=False, implied=implied)
