"""The command `lorakit`: one row of COMMANDS for each subcommand, which imports what it needs when it runs."""

import argparse
import sys
from collections.abc import Callable
from os.path import abspath
from pathlib import Path
from typing import NamedTuple

from lorakit import __version__
from lorakit._optional import need


def _place(text: str) -> Path:
    """A file or folder; an empty name, as of a shell variable that is not set, is not the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file or folder, got an empty name")
    return Path(text)


class Command(NamedTuple):
    """A subcommand: its help, what declares its arguments, and what runs it and returns the exit code."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _declare_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _doctor(args: argparse.Namespace) -> int:
    import json

    from lorakit.course import doctor

    report = doctor.examine()
    print(json.dumps(report, indent=2) if args.json else doctor.render(report))
    return 1 if report["missing"] else 0


def _declare_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", default="smollm2", help="a model's short name (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare the checksum of every cached file")


def _fetch(args: argparse.Namespace) -> int:
    from lorakit.models.download import fetch_model

    print(fetch_model(args.name, verify=args.verify))
    return 0


def _declare_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="a short name, a local folder, or a hub id")
    parser.add_argument("adapter", type=_place, help="a folder with LoRA, rsLoRA or DoRA, lorakit's or PEFT's")
    parser.add_argument("--out", type=_place, required=True, help="the new folder for the plain model")
    parser.add_argument("--dtype", default="auto", help="auto (the base's own), float32, bfloat16 or float16")


def _merge(args: argparse.Namespace) -> int:
    from lorakit.merging.export import export_merged

    print(export_merged(args.base, args.adapter, args.out, args.dtype))
    return 0


def _declare_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=_place, help="a folder with an adapter of any method, lorakit's or PEFT's")
    parser.add_argument("out", type=_place, help="the new folder for the LoRA and its certificate")
    parser.add_argument("--base", required=True, help="a short name, a local folder, or a hub id")
    parser.add_argument("--rank", type=int, help="of the LoRA")
    parser.add_argument(
        "--energy", type=float, metavar="SHARE", help="instead: each layer's smallest rank that keeps it"
    )
    parser.add_argument("--texts", type=_place, metavar="FILE",
                        help="compare on these: .jsonl with prompts or messages, or a text a line")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")


def _convert(args: argparse.Namespace) -> int:
    import json

    from lorakit.merging.convert import convert_adapter, read_texts

    texts = [] if args.texts is None else read_texts(args.texts, args.base)
    show = sys.stderr.isatty()
    found = convert_adapter(args.adapter, args.base, args.out, args.rank, args.energy, texts=texts, show=show)
    print(json.dumps(found.as_record(), indent=2) if args.json else found)
    return 0


def _declare_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=_place, help="a folder with an adapter, lorakit's or PEFT's")
    parser.add_argument("--base", help="compare with it: a short name, a local folder, or a hub id")
    parser.add_argument("--top", type=int, default=10, metavar="K",
                        help="singular vectors tried as intruders; 0 is quick (default: %(default)s)")  # fmt: skip
    parser.add_argument("--epsilon", type=float, default=0.5, help="cosine below which they are (default: %(default)s)")
    parser.add_argument("--figure", type=_place, metavar="FILE.png", help="draw norm and effective rank by layer")
    parser.add_argument("--json", action="store_true", help="print everything, each layer too, as JSON")


def _inspect(args: argparse.Namespace) -> int:
    import json

    from lorakit.merging import inspection_report as report
    from lorakit.merging.against_base import compare_with_base
    from lorakit.merging.inspection import inspect_adapter

    found, compared = inspect_adapter(args.adapter), None
    if args.figure is not None:
        need("lorakit.experiments.adapter_figure", extra="course").save_figure(found, args.figure)
    if args.base is not None:
        compared = compare_with_base(found, args.base, args.top, args.epsilon, show=sys.stderr.isatty())
    print(json.dumps(report.as_record(found, compared), indent=2) if args.json else report.describe(found, compared))
    return 1 if report.is_broken(found, compared) else 0


def _declare_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", type=_place, help="a .jsonl file with prompt and completion, or messages; or its folder"
    )
    parser.add_argument("--model", required=True, help="whose tokenizer: a short name, a local folder, or a hub id")
    parser.add_argument("--chat", action="store_true", help="put the tokenizer's chat template around plain texts")
    parser.add_argument("--turns", choices=("all", "last"), default="all", help="which of a conversation's are learned")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a row (default: the model's context)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _audit(args: argparse.Namespace) -> int:
    import json

    from lorakit.training.audit import audit_data, load_tokenizer

    tokenizer, context = load_tokenizer(args.model)
    files = sorted(args.data.glob("*.jsonl")) if args.data.is_dir() else [args.data]
    if not files:
        raise ValueError(f"expected .jsonl files in {args.data}, got none")
    limit = context if args.max_length is None else args.max_length
    reports = [audit_data(file, tokenizer, limit, args.chat, args.turns) for file in files]
    if args.json:
        print(json.dumps([report.as_record() for report in reports], indent=2))
    else:
        print(*reports, sep="\n\n")
    return 1 if any(report.findings for report in reports) else 0


def _declare_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=_place, help="where to write, such as data/sql")
    parser.add_argument(
        "--version", type=int, default=1, choices=(1, 2), help="the task's edition (default: %(default)s)"
    )


def _data(args: argparse.Namespace) -> int:
    from lorakit.tasks.sql import task

    task.write(args.folder, args.version)
    print(args.folder)
    return 0


def _declare_pretrain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=_place, help="where to write, such as data/tiny (default: the cache)")


def _pretrain(args: argparse.Namespace) -> int:
    from lorakit.tasks import tiny_model

    print(tiny_model.write(args.folder))
    return 0


def _declare_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lessons", nargs="*", metavar="LESSON", help="number or name (default: all, in order)")
    parser.add_argument("--profile", default="laptop", help="laptop, smoke or gpu (default: %(default)s)")
    parser.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="set a parameter of the lessons; the value is read as YAML")  # fmt: skip
    parser.add_argument(
        "--out", type=_place, default=Path("runs"), help="folder for executed copies (default: %(default)s)"
    )
    parser.add_argument("--in-place", action="store_true", help="refresh the lessons' own outputs instead of copying")


def _run(args: argparse.Namespace) -> int:
    if args.in_place and (args.parameters or args.profile != "laptop"):
        raise ValueError("expected --in-place without -p and with the laptop profile, which the lessons' defaults are")
    lessons = need("lorakit.course.lessons", extra="course")
    if args.in_place:
        results = lessons.refresh(lessons.select_lessons(args.lessons, lessons.find_notebooks()))
    else:
        overrides = {name: lessons.read_yaml(value) for name, value in args.parameters}
        results = lessons.run_lessons(args.lessons, args.profile, overrides, args.out)
    return 1 if any(result.error for result in results) else 0


def _declare_exercises(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refresh", action="store_true", help="run the solutions first and refresh their outputs")


def _exercises(args: argparse.Namespace) -> int:
    lessons, exercises = (
        need("lorakit.course.lessons", extra="course"),
        need("lorakit.course.exercises", extra="course"),
    )
    notebooks = lessons.find_notebooks()
    results = lessons.refresh(exercises.find_solutions(notebooks)) if args.refresh else []
    if any(result.error for result in results):
        return 1
    print(*exercises.generate(notebooks), sep="\n")
    return 0


def _pair(text: str) -> tuple[str, int]:
    name, _, rank = text.rpartition("=")
    if not (name and rank.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected NAME=RANK, got {text!r}")
    return name, int(rank)


def _declare_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name (smollm2, llama-2-7b, ...), a folder, a config.json or a hub id")
    parser.add_argument("--method", nargs="+", default=["full", "lora", "qlora"], metavar="METHOD",
                        help="full, lora, lora-8bit, qlora (default: all but lora-8bit, side by side)")  # fmt: skip
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", default=["all-linear"], metavar="NAME",
                        help="layers that get an adapter, by name (default: all-linear)")  # fmt: skip
    parser.add_argument("--exclude-modules", nargs="+", default=[], metavar="NAME", help="layers that get none")
    parser.add_argument("--layers-to-transform", nargs="+", type=int, default=[], metavar="N",
                        help="numbers of the blocks that get adapters (default: all)")  # fmt: skip
    parser.add_argument("--rank-pattern", nargs="+", type=_pair, default=[], metavar="NAME=RANK",
                        help="other ranks for some layers, by name")  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="of each sequence (default: 512, or the context if that is less)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument("--optimizer", default="adamw", help="adamw, adamw-8bit, adamw-paged, adafactor, sgd, "
                        "sgd-momentum (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--checkpointing", action="store_true", help="compute activations twice instead of keeping them"
    )
    parser.add_argument(
        "--master-weights", action="store_true", help="keep a float32 copy of 16-bit weights that train"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def _budget(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from lorakit.cost.budget import budget, table

    settings = {
        **{name: getattr(args, name) for name in ("rank", "tokens", "dtype", "optimizer", "checkpointing")},
        **{"targets": args.targets[0] if len(args.targets) == 1 else args.targets},
        **{"batch_size": args.batch, "master_weights": args.master_weights},
    }
    words = {name: getattr(args, name) for name in ("exclude_modules", "layers_to_transform", "rank_pattern")}
    words["rank_pattern"] = dict(words["rank_pattern"])
    settings["by_layer"] = {name: value for name, value in words.items() if value}
    budgets = [budget(args.model, method, **settings) for method in args.method]
    records = [asdict(each) | {"peak_bytes": each.peak_bytes} for each in budgets]
    print(json.dumps(records, indent=2) if args.json else table(budgets))
    return 0


def _declare_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plans", nargs="+", type=_place, metavar="plan", help="a YAML file: function, grid, folder")
    parser.add_argument(
        "--into", type=_place, metavar="DIR", help="put each plan's folder there, to make all runs anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="say how many runs are missing and what they cost")
    parser.add_argument("--retry", action="store_true", help="make the failed runs again")
    parser.add_argument("--jobs", type=int, help="how many at a time, -1 for all cores (default: the plan's, or one)")


def _sweep(args: argparse.Namespace) -> int:
    plans, records, sweeps = (
        need(f"lorakit.experiments.{name}", extra="sweep") for name in ("plan", "records", "sweep")
    )
    survey, failed = records.survey, 0
    read = [(path, plans.load_plan(path)) for path in args.plans]
    folders = [args.into / Path(abspath(plan.folder)).name if args.into else plan.folder for _, plan in read]
    if args.jobs is not None:
        sweeps.check_jobs(args.jobs)
    for folder in folders if not args.dry_run else []:
        sweeps.prepare(folder)  # that of the last plan, too, before the first plan's runs
    for (path, plan), folder in zip(read, folders, strict=True):
        title = f"{path.name}: " if len(args.plans) > 1 else ""
        print(f"{title}{survey(folder, plan.settings, args.retry, guide=plan.folder)}")
        if args.dry_run:
            continue
        options = plan.options | ({} if args.jobs is None else {"jobs": args.jobs})
        frame = sweeps.sweep(plan.function, plan.grid, folder, retry=args.retry, **options)
        print(survey(folder, plan.settings))
        for error in frame.error[frame.error != ""].drop_duplicates():
            print(error.rstrip().split("\n")[-1])
        print(folder)
        failed += (frame.error != "").sum()
    return 1 if failed else 0


COMMANDS = {
    "doctor": Command("report versions, hardware and known traps of this machine", _declare_doctor, _doctor),
    "fetch": Command("put the base model into the cache and print its folder", _declare_fetch, _fetch),
    "merge": Command("merge an adapter into its base, check it, save a plain model", _declare_merge, _merge),
    "convert": Command("make a LoRA of an adapter of any method, certified", _declare_convert, _convert),
    "inspect": Command("say what a saved adapter is, and who serves it", _declare_inspect, _inspect),
    "audit": Command("find what is wrong with training data, as a tokenizer sees it", _declare_audit, _audit),
    "budget": Command("what a training step needs, from a model's config alone", _declare_budget, _budget),
    "data": Command("write the text-to-SQL task's files and their card", _declare_data, _data),
    "pretrain": Command("make the tiny base model from nothing, about two minutes", _declare_pretrain, _pretrain),
    "sweep": Command("make the runs of a grid that are missing, each recorded as it ends", _declare_sweep, _sweep),
    "run": Command("run lessons and keep the executed notebooks", _declare_run, _run),
    "exercises": Command("derive the exercise notebooks from their solutions", _declare_exercises, _exercises),
}


def main(argv: list[str] | None = None) -> int:
    """Runs `lorakit argv...` and returns its exit code: 0 well, 1 something failed, 2 wrongly called, 130 stopped."""
    parser = argparse.ArgumentParser(prog="lorakit", description="LoRA from the formula up: the course's command")
    parser.add_argument("--version", action="version", version=f"lorakit {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.declare(subparsers.add_parser(name, help=command.help, description=command.help))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"lorakit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlorakit: stopped", file=sys.stderr)
        return 130
