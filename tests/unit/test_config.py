"""Promises of the settings: whatever is wrong is refused in one line that names the key and where it was written."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.config import Settings, dump_settings, load_settings, settings_fields
from cxr_retrieval.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.yaml"))


def refused(*words: str, files: tuple[Path, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load_settings([str(file) for file in files], words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(folder: Path, text: str, name: str = "settings.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("training.epoch", "training.epochs"),
        ("traning.batch_size", "training.batch_size"),
        ("corpus.margin", "losses.margin"),  # the right name in the wrong section
        ("epochs", "training.epochs"),
        ("corpus", "corpus.fit"),
        ("workspaces", "workspace"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_the_file(wrong: str, nearest: str, tmp_path: Path) -> None:
    section, _, key = wrong.rpartition(".")
    file = written(tmp_path, f"{section}:\n  {key}: 3\n" if section else f"{key}: 3\n")
    assert refused(files=(file,)) == f"unknown setting {wrong!r} in {file}: did you mean {nearest!r}?"
    assert refused(f"{wrong}=3") == f"unknown setting {wrong!r} in the command line: did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("training.epochs=many", "setting training.epochs='many' in the command line: input should be a valid integer"),
        ("training.epochs=1.5", "setting training.epochs=1.5 in the command line: input should be a valid integer"),
        ("training.augment=perhaps", "setting training.augment='perhaps' in the command line: input should be a valid"),
        ("corpus.views=PA", "setting corpus.views='PA' in the command line: input should be a valid list"),
        ("corpus.views=[PA, 3]", "setting corpus.views=['PA', 3] in the command line: input should be a valid string"),
        (
            "corpus.archive={a: b}",
            "setting corpus.archive={'a': 'b'} in the command line: input should be a valid string",
        ),
        (
            "corpus.archive.a=b",
            "unknown setting 'corpus.archive.a' in the command line: did you mean 'corpus.archive'?",
        ),
        ("training.epochs=", "setting training.epochs='' in the command line: input should be a valid integer"),
        ("training.epochs=0", "setting training.epochs=0 in the command line: input should be greater than or equal"),
        ("losses.temperature=0", "setting losses.temperature=0 in the command line: input should be greater than 0"),
        ("losses.margin=2.1", "setting losses.margin=2.1 in the command line: input should be less than or equal to 2"),
        ("losses.margin=.nan", "setting losses.margin=nan in the command line: input should be a finite number"),
        ("losses.negative_weight=.inf", "setting losses.negative_weight=inf in the command line: input should be a"),
        ("corpus.split=random", "setting corpus.split='random' in the command line: input should be 'hash', "),
        ("corpus.name=../x", "setting corpus.name='../x' in the command line: string should match pattern"),
        ("corpus.name=", "setting corpus.name='' in the command line: string should match pattern"),
        ("corpus.name=2024-13-45", "cannot read 'corpus.name=2024-13-45' from the command line: the value is not YAML"),
        ("corpus.views=[PA", "cannot read 'corpus.views=[PA' from the command line: the value is not YAML"),
        ("epochs", "cannot read 'epochs' from the command line: write section.key=value"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_key_and_place(word: str, told: str) -> None:
    assert refused(word).startswith(told)


def test_a_wrong_value_names_the_file_that_it_is_from(tmp_path: Path) -> None:
    first = written(tmp_path, "training: {epochs: 0}\n", "first.yaml")
    second = written(tmp_path, "training: {batch_size: 1}\n", "second.yaml")
    assert refused(files=(second,)).startswith(f"setting training.batch_size=1 in {second}: ")
    assert refused("training.epochs=-1", files=(first,)).startswith("setting training.epochs=-1 in the command line: ")


def test_later_files_win_over_earlier_ones_and_words_over_files(tmp_path: Path) -> None:
    first = written(tmp_path, "seed: 1\ntraining:\n  epochs: 5\n  workers: 2\ncorpus:\n  views: [PA]\n", "1.yaml")
    second = written(tmp_path, "training:\n  epochs: 6\n  learning_rate: 1e-3\ncorpus:\n  views: null\n", "2.yaml")
    files = [str(first), str(second)]
    loaded = load_settings(files, ["training.workers=4", "seed=2", "seed=3"])
    training = loaded.training
    assert (training.epochs, training.workers, training.learning_rate, loaded.seed) == (6, 4, 1e-3, 3)
    assert loaded.corpus.views is None
    assert load_settings(reversed(files)).training.epochs == 5
    assert loaded.losses == Settings().losses


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("training: [epochs: 3", "is not YAML: "),
        ("a: b: c", "is not YAML: "),
        ("seed: 2024-13-45", "is not YAML: "),
        ("x: !!python/object/apply:os.system [ls]", "is not YAML: "),
        ("- training.epochs=3", "must hold sections with settings, not a list"),
        ("training.epochs=3", "must hold sections with settings, not a str"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_by_name(text: str, told: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    assert refused(files=(file,)).startswith(f"config file {file} {told}")


def test_a_file_that_is_missing_or_unreadable_is_refused_by_name(tmp_path: Path) -> None:
    assert refused(files=(tmp_path / "no.yaml",)) == f"config file {tmp_path / 'no.yaml'} does not exist"
    assert refused(files=(tmp_path,)).startswith(f"config file {tmp_path} cannot be read")
    (tmp_path / "latin.yaml").write_bytes(b"corpus: {name: \xe9}")
    assert "cannot be read" in refused(files=(tmp_path / "latin.yaml",))


def test_an_empty_file_and_an_empty_section_change_nothing(tmp_path: Path) -> None:
    files = [str(written(tmp_path, text, f"{n}.yaml")) for n, text in enumerate(["", "# nothing\n", "corpus:\n"])]
    assert load_settings(files) == Settings()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("corpus.validation_share=0.4", "corpus.test_share=0.5"), "corpus.validation_share + corpus.test_share"),
        (("training.lanes=4", "training.workers=3"), "training.lanes=4 is not a multiple of training.workers=3"),
        (("training.workers=2", "training.min_workers=3"), "training.min_workers=3 is above training.workers=2"),
        (("training.min_workers=1", "network.normalisation=batch"), "training.min_workers with network.norm"),
        (("training.precision=float16",), "training.precision=float16 needs training.gpu=true"),
        (("training.pretraining=2", "training.augment=false"), "training.pretraining needs training.augment=true"),
        (
            ("training.pretraining=2", "corpus.size=100"),
            "training.pretraining with network.steps=3 needs corpus.size in multiples of 8",
        ),
        (("corpus.ages=[90, 18]",), "corpus.ages=[90, 18] must be two ages in years, the lower one first"),
        (
            ("network.weights=imagenet",),
            "network.weights=imagenet are those of network.backbone=efficientnet_lite0, not",
        ),
        (("training.batch_size=30",), "training.batch_size=30 is not a multiple of training.lanes=4"),
        (("training.accumulation=3",), "training.batch_size=32 is not a multiple of training.lanes=4 x training.acc"),
    ],
)
def test_a_rule_between_settings_names_them(words: tuple[str, ...], told: str) -> None:
    assert refused(*words).startswith(told)
    assert refused(*words).endswith("(in the command line)")


def test_a_rule_between_settings_names_the_files_that_broke_it(tmp_path: Path) -> None:
    file = written(tmp_path, "training: {workers: 3}")
    assert refused("training.lanes=4", files=(file,)).endswith(f"(in {file}, the command line)")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/data/a #1", "/data/a #1"),  # a comment in YAML, a folder here
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("a=b", "a=b"),
        ("'12'", "12"),
        ("null", None),
        ("./here", "./here"),
    ],
)
def test_a_word_is_taken_as_a_person_means_it(text: str, value: str | None) -> None:
    assert load_settings([], [f"corpus.archive={text}"]).corpus.archive == value


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3", "+1e-3"])
def test_a_number_may_have_an_exponent(text: str, tmp_path: Path) -> None:
    assert load_settings([], [f"training.learning_rate={text}"]).training.learning_rate == 1e-3
    file = written(tmp_path, f"training: {{learning_rate: {text}}}")
    assert load_settings([str(file)]).training.learning_rate == 1e-3


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().training.epochs = 3  # type: ignore[misc]


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(
    archive=st.none() | st.text(min_size=1),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True),
    views=st.none() | st.lists(st.text()),
    weight=finite.filter(lambda value: value >= 0),
    rate=st.floats(1e-12, 1),
    augment=st.booleans(),
    side=st.none() | st.integers(32, 1024),
)
@settings(max_examples=60)
def test_what_is_dumped_loads_back_to_the_same_settings(
    tmp_path_factory: pytest.TempPathFactory, archive: Any, name: str, views: Any, weight: float, rate: float,
    augment: bool, side: Any,
) -> None:  # fmt: skip
    plain = Settings().model_dump()
    plain["corpus"] |= {"archive": archive, "name": name, "views": views}
    plain["losses"]["negative_weight"] = weight
    plain["training"] |= {"learning_rate": rate, "augment": augment}
    plain["network"]["crop_side"] = side
    wanted = Settings.model_validate(plain)
    file = written(tmp_path_factory.getbasetemp(), dump_settings(wanted), "dumped.yaml")
    assert load_settings([str(file)]) == wanted


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_that_ships_is_valid(file: Path) -> None:
    loaded = load_settings([str(file)])
    assert loaded.privacy.pseudonymise is False, "configs of public archives say so visibly"
    for section, values in yaml.safe_load(file.read_text()).items():
        found = getattr(loaded, section)
        for key, value in values.items() if isinstance(values, dict) else ():
            assert getattr(found, key) == value, f"{section}.{key}"


def test_configs_ship() -> None:
    assert {"demo", "nih_small", "nih_full"} <= {file.stem for file in CONFIGS}


@pytest.mark.parametrize(
    ("key", "field"), list(settings_fields()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_setting_has_a_meaning_and_a_valid_default(key: str, field: Any) -> None:
    assert field.description
    assert field.description.isascii()
    assert not field.description.endswith(".")
    assert not field.is_required(), key


def test_defaults_are_valid_when_they_are_written_out() -> None:
    assert Settings.model_validate(Settings().model_dump()) == Settings()
