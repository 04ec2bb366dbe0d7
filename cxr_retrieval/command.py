"""The command line that every job shares: settings, help, plan, errors in one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cxr_retrieval import config, console, storage
from cxr_retrieval.config import Settings
from cxr_retrieval.errors import UserError, user_error_in

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a submitted job, and for no other

Job = Callable[[Settings, argparse.Namespace], None]


def run(
    name: str,
    about: str,
    job: Job,
    plan: Job,
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    *,
    words: str | None = None,
    on_cluster: bool = True,
    writes: Sequence[str] = ("workspace",),
    implied: Callable[[argparse.Namespace], list[str]] | None = None,
) -> None:
    """Parse the command line, then run `job` (or `plan` under --plan). Ends the process with its exit status.

    `words` names what may stand on the command line beside settings (it arrives as `options.rest`); `implied` turns a
    job's own options into settings. Places that the settings name are looked at first, unless the job needs no cluster,
    and written to where the job `writes` to them.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=settings_help(),
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings that win over the files")
    if words:
        parser.usage = f"%(prog)s [options] {words.upper()}... [section.key=value]..."
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML settings; later files win")
    parser.add_argument("--plan", action="store_true", help="say what would run, and stop")
    parser.add_argument("--print-config", action="store_true", help="print the settings in force as YAML, and stop")
    if arguments:
        arguments(parser)
    options = parser.parse_intermixed_args()
    before = storage.retries()
    try:
        require_text(sys.argv[1:])
        # A path may hold `=` too: no key has a slash.
        keys = [word for word in options.settings if "=" in word and "/" not in word.partition("=")[0]]
        options.rest = [word for word in options.settings if word not in keys]
        if options.rest and words is None:
            raise UserError(f"cannot read {options.rest[0]!r} from {config.COMMAND_LINE}: write section.key=value")
        settings = config.load_settings(
            options.config, keys + (implied(options) if implied else []), storage.read_bytes
        )
        places = config.places(settings)
        if on_cluster:
            refuse_relative(places)
        settings = settings.model_copy(update={"workspace": storage.canonical(settings.workspace)})
        if options.print_config:
            console.out.print(config.dump_settings(settings), end="", soft_wrap=True)
            return
        if on_cluster:
            for uri in places.values():
                storage.check(uri)
        if on_cluster and not options.plan:
            for key in writes:
                if key in places:
                    storage.check_writing(storage.join(places[key], config.WRITTEN[key]))
        (plan if options.plan else job)(settings, options)
    except KeyboardInterrupt:
        console.say("stopped; run the same command again to go on")
        sys.exit(130)
    except Exception as error:
        mendable = user_error_in(error)
        if mendable is None:
            raise  # a bug: its traceback is what helps
        console.say(f"error: {mendable}")
        sys.exit(1)
    finally:
        if sent_again := storage.retries() - before:
            console.say(f"storage: {sent_again:,} requests were sent again (throttled, cut off or timed out)")


def require_text(words: Sequence[str]) -> None:
    """Raises UserError for a word of bytes that are no text, which could be neither shown nor stored."""
    for number, word in enumerate(words, 1):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"word {number} of the command line, {console.printable(word)}, is not UTF-8: rename the file, or give"
                " the name as it is stored"
            ) from None


def refuse_relative(places: dict[str, str]) -> None:
    """Under `ray job submit`, refuse places that mean another folder on every machine, the first by its name."""
    if SUBMITTED not in os.environ:
        return
    for key, uri in places.items():
        if not storage.is_s3(uri) and not Path(uri.removeprefix("file://")).expanduser().is_absolute():
            raise UserError(
                f"{key}={uri} is a relative path, which a submitted job would look for in Ray's own scratch folder:"
                " give s3://bucket/prefix, or an absolute path that every node sees"
            )


def settings_help() -> str:
    """Every setting with its meaning, type, range and default, for --help."""
    lines = ["settings:"]
    for key, field in config.settings_fields():
        bounds = config.describe_range(field)
        default = "null" if field.default is None else field.default
        lines.append(
            f"  {key}  ({config.describe_type(field.annotation)}{', ' + bounds if bounds else ''}; default {default})"
        )
        lines.append(f"      {field.description}")
    return "\n".join(lines).replace("%", "%%")
