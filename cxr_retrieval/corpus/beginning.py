"""The beginning of an archive: its first partition, known before the rest of a long listing is."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from cxr_retrieval import storage
from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.archive import IMAGE_ENDINGS, Archive
from cxr_retrieval.corpus.formats import format_of
from cxr_retrieval.corpus.formats.labels import HeaderFormat, Label, Tables
from cxr_retrieval.tombstones import NOBODY, RemovedPatients

MOST_ROWS = 100_000  # of the label tables, which may be in another order than the listing: a second or two


class NotToldYet(Exception):
    """The beginning of an archive does not tell enough of its first partition."""


class Beginning(Archive):
    """The first partition of an archive, as far as the beginning of its listing and of its tables tells.

    A guess: what is listed later may have the name of one of these images, or a second label row may come. Tables are
    looked for right in the archive's folder, and labels are read until every image has its row.
    """

    def __init__(self, settings: CorpusSettings, removed: RemovedPatients = NOBODY) -> None:
        """Raises NotToldYet where a table or a row is missing so far, where headers tell what the images are, and where
        the archive has no more than one partition; and UserError as an Archive does."""
        if isinstance(format_of(settings), HeaderFormat):
            raise NotToldYet
        super().__init__(settings, removed)

    def _files(self, left_out: Callable[[str], None]) -> Iterator[storage.StoredFile]:
        yield from storage.list_top(self.uri, lambda name: self._format.table_kind(name) is not None)
        images = (file for file in storage.list_files(self.uri, left_out) if file.path.lower().endswith(IMAGE_ENDINGS))
        yield from islice(images, self._settings.partition_images)
        if next(images, None) is None:
            raise NotToldYet

    def _require_whole(self, tables: Tables, _: Mapping[str, str]) -> None:
        lists = self._format.lists or {} if self._settings.split == "official" else {}
        if not {*self._format.needs, *lists} <= tables.keys():
            raise NotToldYet

    def _told(self, tables: Tables) -> Iterator[Label]:
        names = self._database.execute("SELECT path, image FROM listing").fetchall()
        wanted = {row["image"] for row in names} | {row["path"].rpartition("/")[2] for row in names}
        seen: set[str] = set()
        for number, label in enumerate(self._format.labels(tables)):
            if label.image in wanted:
                seen.add(label.image)
                yield label
                if len(seen) == len(names):
                    return
            if number == MOST_ROWS:
                raise NotToldYet

    def _hashes(self, _: Tables) -> dict[str, str]:
        return {}
