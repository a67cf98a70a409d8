"""The command line: words in, one clear answer out. Nothing heavy is imported before a verb needs it."""

import json
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from potstill import __version__
from potstill.core.errors import Interrupted, UserError

if TYPE_CHECKING:
    from potstill.core.artifact import Artifact
    from potstill.recipe.header import Recipe
    from potstill.sandbox.grader import Grade

RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="STAGE.FIELD=VALUE",
    help="Change a field, or with hf:ORG/NAME=path:FOLDER a model wherever it is named; may be repeated.",
)


def out_option(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        help=f"The run's folder; relative to the folder you are in, as all paths in a recipe are.  [default: {default}]",
    )


OUT = out_option("runs/NAME")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")
QUIET = click.option("--quiet", is_flag=True, help="No progress, only the result.")

PROCESSES = click.option(
    "--processes", type=click.IntRange(1), default=1, help="Number of training processes, one per GPU.  [default: 1]"
)


def _load_plugin(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Before anything else of the command: what the file defines, recipes may name."""
    if path is None or context.resilient_parsing:
        return
    from potstill.commands.plugins import load

    try:
        load(path)
    except UserError as error:
        fail(f"error: {error}", 2)


def _without_sandbox(context: click.Context, parameter: click.Parameter, unsafe: bool) -> None:
    """What the command judges, it runs as the user; said aloud every time, and no recipe can ask for it."""
    if not unsafe or context.resilient_parsing:
        return
    from potstill.commands.sandbox import UNSAFE
    from potstill.sandbox.grader import Grader
    from potstill.sandbox.trial import choose
    from potstill.scorers import programs

    click.echo(UNSAFE, err=True)
    programs.use(lambda: Grader(choose("none")))


GRPO_RECIPE = "small/grpo-primer"  # the shipped recipe that the quickstart names at its end
UNSAFE_OPTION = click.option(
    "--unsafe-no-sandbox",
    is_flag=True,
    expose_value=False,
    callback=_without_sandbox,
    help="Run programs that models write with your own rights, where no sandbox is to be had.",
)
PLUGIN = click.option(
    "--plugin",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_load_plugin,
    metavar="FILE",
    help="Python file of your own that defines a reward or another component; it is run, unprotected.",
)


def fail(message: str, code: int) -> NoReturn:
    click.echo(message, err=True)
    sys.exit(code)


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The user's mistakes end with code 2, a stop with 130, ours with a traceback and 1."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        from potstill.run.stopper import Stopper

        stopper = Stopper(at_once=True)
        context = click.get_current_context(silent=True)
        if context is not None:
            context.obj = stopper
        try:
            with stopper.listening():
                verb(*args, **kwargs)
        except UserError as error:
            fail(str(error) if str(error).count("\n") else f"error: {error}", 2)
        except BrokenPipeError:
            sys.exit(0)
        except (Interrupted, KeyboardInterrupt) as error:
            click.echo(str(error) or "stopped", err=True)
            stopper.leave()
            sys.exit(130)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="potstill")
def main() -> None:
    """Distil a large language model into a small one, and prove whether distilling helped.

    \b
    First:       potstill quickstart
    Your own:    potstill show quickstart > mine.toml, then check, plan and run mine.toml
    Afterwards:  potstill report RUN, then chat, serve, verify or export
    """


@main.command()
@SET
@OUT
@PROCESSES
@QUIET
@JSON
@guarded
def quickstart(overrides: tuple[str, ...], out: Path | None, processes: int, quiet: bool, as_json: bool) -> None:
    """The whole still on a small bilingual task: needs no file, no network and no GPU."""
    from potstill.recipe.parse import load_recipe

    _spread(processes)
    done = _run(lambda: load_recipe(shipped("quickstart.toml"), overrides), out, quiet, as_json)
    if done and not (quiet or as_json):
        _say_next(done)


@main.command()
@RECIPE
@SET
@JSON
@PLUGIN
@UNSAFE_OPTION
@guarded
def check(recipe: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Find every mistake in RECIPE without running it."""
    from potstill.core.errors import RecipeError
    from potstill.core.progress import waiting
    from potstill.recipe.parse import read_recipe

    draft = read_recipe(_recipe_path(recipe), overrides)
    source = Path(draft.source).name
    if draft.problems and not as_json:  # at once: models and rows take long to read
        click.echo(RecipeError(source, draft.problems), err=True)

    from potstill.run import preflight

    with waiting("reading models and rows"):
        seen = preflight.check(draft)
    if as_json:
        problems = [{"place": p.place, "value": p.value, "rule": p.rule} for p in (*draft.problems, *seen.problems)]
        stages = {"ok": True, "name": draft.name, "stages": [stage.name for stage in draft.stages]}
        click.echo(json.dumps({"ok": False, "problems": problems} if problems else stages, indent=2))
    elif seen.problems:
        of = " of models, rows and this machine, as far as the file can be read" if draft.problems else ""
        click.echo(RecipeError(source, seen.problems, of), err=True)
    elif not draft.problems:
        click.echo(f"{recipe}: {len(draft.stages)} stages, no problem")
        for note in seen.notes:
            click.echo(note)
    if draft.problems or seen.problems:
        sys.exit(2)


@main.command()
@RECIPE
@guarded
def show(recipe: Path) -> None:
    """Print RECIPE, such as the shipped `quickstart` or `small/dolly-en`, to start your own from."""
    try:
        click.echo(_recipe_path(recipe).read_text(encoding="utf-8"), nl=False)
    except FileNotFoundError:
        known = sorted(str(path.relative_to(shipped_folder()).with_suffix("")) for path in shipped_folder().rglob("*.toml"))
        raise UserError(f"{recipe}: no such recipe (shipped: {', '.join(known)})") from None


@main.command()
@RECIPE
@SET
@OUT
@click.option("--gpus", type=click.IntRange(1), help="Estimate training on this number of GPUs.")
@click.option("--tflops", type=click.FloatRange(0, min_open=True), default=400.0, show_default=True, help="Of each, in bf16.")
@click.option(
    "--bandwidth", type=click.FloatRange(0, min_open=True), help="GB/s of each.  [default: 300 up to 8 GPUs, else 40]"
)
@JSON
@PLUGIN
@guarded
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    gpus: int | None,
    tflops: float,
    bandwidth: float | None,
    as_json: bool,
) -> None:
    """Show RECIPE's stages: what is done already, and roughly what the rest costs.

    Ends with 2, as check does, where a problem is known already; what this machine has no room for is only marked.
    """
    from potstill.recipe.parse import load_recipe

    found = load_recipe(_recipe_path(recipe), overrides)

    from potstill.commands.plan import estimate, print_plan
    from potstill.commands.spread import Cluster, print_spread
    from potstill.core.progress import waiting

    cluster = Cluster(gpus, tflops, bandwidth) if gpus is not None else None
    with waiting("reading rows, timing this machine"):
        planned = estimate(found, out or Path("runs") / found.name, cluster, measure=cluster is None)
    if as_json:
        click.echo(json.dumps([line.json() for line in planned.lines], indent=2))
    elif cluster is not None:
        print_spread(found.name, cluster, [line.json() for line in planned.lines])
    else:
        print_plan(planned)
        _say_leftovers(found, out or Path("runs") / found.name)
    if planned.problems:
        if as_json or cluster is not None:  # neither of which shows them
            click.echo("\n".join(f"! {problem}" for problem in planned.problems), err=True)
        sys.exit(2)


@main.command()
@RECIPE
@SET
@OUT
@PROCESSES
@QUIET
@JSON
@PLUGIN
@UNSAFE_OPTION
@guarded
def run(recipe: Path, overrides: tuple[str, ...], out: Path | None, processes: int, quiet: bool, as_json: bool) -> None:
    """Run RECIPE; go on where an interrupted run stopped, redo only what changed."""
    from potstill.recipe.parse import load_recipe

    _spread(processes)
    _run(lambda: load_recipe(_recipe_path(recipe), overrides), out, quiet, as_json)


@main.command()
@click.argument("models", nargs=-1, metavar="NAME=MODEL NAME=MODEL...")
@click.option("--data", required=True, metavar="FILE", help="Rows to score, all of them: .jsonl, .csv or .parquet.")
@click.option("--teacher", metavar="NAME", help="The model that the others are measured by: share kept, KL.")
@click.option("--rows", type=click.IntRange(1), help="Score this number of rows, drawn by a hash.  [default: all]")
@click.option("--metrics", metavar="KIND,KIND", help="What to measure, the deciding metric first; see `potstill list metric`.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Longest answer.  [default: 128]")
@SET
@out_option("runs/compare-FILE")
@QUIET
@JSON
@guarded
def compare(
    models: tuple[str, ...],
    data: str,
    teacher: str | None,
    rows: int | None,
    metrics: str | None,
    max_new_tokens: int | None,
    overrides: tuple[str, ...],
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Score finished models on the same rows and say which is better, with intervals; trains nothing.

    \b
    potstill compare base=hf:ORG/NAME tuned=path:FOLDER --data rows.jsonl

    A model is hf:ORG/NAME, path:FOLDER or path:FILE.gguf. The first model, or the one called base, is what the others are
    compared with. --set changes any other field: data.response=output names a column, prompts.format=alpaca a form for models
    without a chat template, study.primary=nll the metric that decides.
    """
    from potstill.commands.compare import comparison, in_words_of, models_of

    recipe = comparison(
        models,
        data,
        teacher=teacher,
        rows=rows,
        metrics=metrics,
        max_new_tokens=max_new_tokens,
        overrides=overrides,
    )
    with in_words_of(models_of(recipe)):
        _run(lambda: recipe, out, quiet, as_json)


@main.command(name="list")
@click.argument("name", required=False)
@JSON
@PLUGIN
@guarded
def list_components(name: str | None, as_json: bool) -> None:
    """What a recipe can name, one line each; with NAME, a role or a kind such as sft, its fields too."""
    import shutil

    from potstill.commands.list import components, print_components, print_overview

    found = components(name)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif name is None:
        print_overview(found, shutil.get_terminal_size().columns)
    else:
        print_components(found)


@main.command()
@click.argument("run")
@JSON
@guarded
def report(run: str, as_json: bool) -> None:
    """Print RUN's table and verdicts, and where its page is. RUN is a folder or a name under runs/.

    Works while the run goes on, once its evaluation is finished.
    """
    from potstill.run.folder import find_run

    _show_report(find_run(run), as_json)


@main.command()
@click.argument("target", metavar="RUN[:MODEL] | FILE.gguf")
@click.option("--temperature", type=click.FloatRange(0, 10), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest answer.")
@click.option("--context", type=click.IntRange(16), help="Tokens of a conversation.  [default: 4096, or the model's positions]")
@click.option("--prompt", "question", help="Ask this once and leave.")
@guarded
def chat(target: str, temperature: float, max_new_tokens: int, context: int | None, question: str | None) -> None:
    """Talk to a model of RUN (default: its last distilled one) or to a GGUF file, answers streaming.

    A file is computed by llama.cpp, with its own chat template. An empty line, quit, exit or Ctrl-D ends it; Ctrl-C ends an
    answer. Works while the run goes on, once that model is finished.
    """
    with click.get_current_context().obj.deaf():  # Ctrl-C is the conversation's own
        from potstill.commands.chat import chat_with

        chat_with(target, temperature=temperature, max_new_tokens=max_new_tokens, question=question, context=context)


@main.command()
@click.argument("target", metavar="EXPORT|RUN|FOLDER|FILE.gguf")
@click.option("--against", metavar="MODEL", help="hf:ORG/NAME or path:FOLDER.  [default: what the files were made from]")
@click.option(
    "--positions", type=click.IntRange(1), default=48, show_default=True, help="Compare the next token at so many places."
)
@QUIET
@JSON
@guarded
def verify(target: str, against: str | None, positions: int, quiet: bool, as_json: bool) -> None:
    """Open exported files in their runtime and compare them with the model that they were made from.

    GGUF files and a page's model are opened in llama.cpp (pip install 'potstill[device]'), safetensors in transformers, packed
    ones by compressed-tensors (pip install compressed-tensors). Compared are the token ids of 80 tricky texts, and the whole
    distribution of the next token, position by position; in transformers every weight; a greedy text is shown. The result goes
    into the export's verify.json and on its card.

    Ends with 0 when every file passes, with 1 when one fails or was not opened for want of its runtime, with 2 on bad input.
    """
    from potstill.commands.verify import passed, print_record, targets_of
    from potstill.commands.verify import verify as verified
    from potstill.core.progress import Progress

    progress = Progress("quiet" if quiet else "auto")
    records = []
    for found in targets_of(target, against):
        records.append(verified(found, positions, progress))
        if not as_json:
            print_record(records[-1])
    if as_json:
        click.echo(json.dumps(records, indent=2, ensure_ascii=False))
    if not all(passed(record) for record in records):
        sys.exit(1)


@main.command()
@click.argument("target", metavar="RUN[:MODEL] | FILE.gguf")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0: at every address, with a key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free.")
@click.option("--key-file", type=click.Path(path_type=Path), help="File with a key that requests must carry.")
@click.option("--key-env", metavar="NAME", help="Environment variable with that key.")
@click.option("--no-key", is_flag=True, help="Let other machines ask without a key.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="Host name under which clients ask; may be repeated.")
@click.option("--models", metavar="NAME,NAME", help="What the playground compares at first.  [default: one of each role]")
@click.option(
    "--engine",
    type=click.Choice(["auto", "llama.cpp", "torch"]),
    default="auto",
    show_default=True,
    help="auto: llama.cpp where it is installed and the run exported a file of the model.",
)
@click.option("--draft", metavar="RUN:MODEL | FILE.gguf", help="A smaller model that writes ahead of it, by llama.cpp.")
@click.option("--draft-tokens", type=click.IntRange(1, 64), help="How many tokens ahead.  [default: 3]")
@click.option("--context", type=click.IntRange(16), default=2048, show_default=True, help="Tokens of a prompt and its answer.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Longest answer, in tokens.")
@click.option("--streams", type=click.IntRange(1, 256), default=4, show_default=True, help="Answers written at once.")
@click.option("--queue", type=click.IntRange(0, 10_000), default=32, show_default=True, help="Requests that may wait.")
@click.option("--max-body", type=click.IntRange(1024), default=1 << 20, show_default=True, help="Bytes of a request.")
@click.option("--threads", type=click.IntRange(1), help="Threads of llama.cpp.  [default: cores - 1]")
@guarded
def serve(
    target: str,
    host: str,
    port: int,
    key_file: Path | None,
    key_env: str | None,
    no_key: bool,
    allow_host: tuple[str, ...],
    models: str | None,
    engine: Literal["auto", "llama.cpp", "torch"],
    draft: str | None,
    draft_tokens: int | None,
    context: int,
    max_tokens: int,
    streams: int,
    queue: int,
    max_body: int,
    threads: int | None,
) -> None:
    """Answer OpenAI's API for a model of RUN (default: its last distilled one), with a page that compares the study's models.

    Only programs of this machine can ask unless --host says otherwise, which needs a key. Ctrl-C ends it: answers on their way
    get ten seconds.
    """
    with click.get_current_context().obj.deaf():  # signals are the server's own
        from potstill.serve.installed import check_installed

        check_installed()

        from potstill.serve.app import Limits
        from potstill.serve.running import Address, check_key, key_of
        from potstill.serve.running import serve as serve_until_stopped
        from potstill.serve.shelf import Opening

        key, address = key_of(key_file, key_env), Address(host, port, allow_host)
        check_key(address, key, without=no_key)
        opening = Opening(engine, context, streams, *([threads] if threads is not None else []))
        compared = [name.strip() for name in models.split(",") if name.strip()] if models else []
        limits = Limits(max_tokens, max_body, queue)
        if draft_tokens is not None and not draft:
            raise UserError("--draft-tokens is for --draft; name a smaller model there, or leave it out")
        drafting: dict[str, Any] = {"draft": draft} if draft else {}
        drafting |= {"ahead": draft_tokens} if draft_tokens is not None else {}
        serve_until_stopped(target, address, opening, limits, key=key, models=compared, say=click.echo, **drafting)


@main.command()
@click.argument("target", metavar="RUN[:MODEL]")
@click.option("--to", "kinds", multiple=True, required=True, metavar="FORMAT", help="gguf, web, …; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="The folder.  [default: exports/RECIPE-MODEL]")
@click.option("--wllama", default="", metavar="PATH", help="For web: the archive of `npm pack`, or the package's folder.")
@QUIET
@JSON
@guarded
def export(target: str, kinds: tuple[str, ...], out: Path | None, wllama: str, quiet: bool, as_json: bool) -> None:
    """Write a finished model of RUN for other programs; `potstill list exporter` names the formats.

    \b
    potstill export RUN:MODEL --to gguf   for llama.cpp, Ollama, LM Studio
    potstill export RUN:MODEL --to web    a page that runs it in a browser

    Without MODEL it is the run's last four-bit model, or else the last distilled one.
    """
    from potstill.commands.export import export as write
    from potstill.commands.export import next_steps
    from potstill.core.progress import Progress

    made = write(target, kinds, out, wllama, Progress("quiet" if quiet or as_json else "auto"))
    if as_json:
        click.echo(json.dumps({"folder": str(made.folder), **made.summary}, indent=2))
    else:
        click.echo("\n".join(next_steps(made)))


@main.command()
@JSON
@guarded
def doctor(as_json: bool) -> None:
    """What this machine has, and what is missing for what."""
    from potstill.commands.doctor import findings, print_findings

    found = findings()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_findings(found)


@main.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--stdin", type=click.Path(path_type=Path), metavar="F", help="What the program reads.  [default: nothing]")
@click.option("--expect", type=click.Path(path_type=Path), metavar="F", help="What it must print.")
@click.option("--tests", type=click.Path(path_type=Path), metavar="F", help="Asserts that must hold of what it defines.")
@click.option("--jobs", type=click.Path(path_type=Path), metavar="F", help="Many programs: JSON lines, see above.")
@click.option("--time-s", type=float, default=4.0, show_default=True, help="Seconds that a run may take.")
@click.option("--memory-mb", type=int, default=512, show_default=True, help="Memory of a run, MiB.")
@click.option("--workers", type=click.IntRange(1, 256), help="Runs at once.  [default: cores - 1]")
@click.option("--backend", metavar="NAME", help="Which sandbox.  [default: the first that passes its trial]")
@click.option("--unsafe-no-sandbox", "unsafe", is_flag=True, help="Run programs with your own rights. Only for what you trust.")
@JSON
@guarded
def sandbox(
    file: Path | None,
    stdin: Path | None,
    expect: Path | None,
    tests: Path | None,
    jobs: Path | None,
    time_s: float,
    memory_mb: int,
    workers: int | None,
    backend: str | None,
    unsafe: bool,
    as_json: bool,
) -> None:
    """Run a Python program that nobody trusts, and judge it by its tests.

    \b
    potstill sandbox FILE --stdin F --expect F
    potstill sandbox FILE --tests F
    potstill sandbox --jobs F.jsonl

    A line of --jobs is an object with id and program, and with stdin and expected, or with tests; the answers are JSON lines
    in the same order. The verdict is pass, fail, timeout, memory, output_limit, crash, denied, or abstain where the sandbox
    itself failed, or a line is no job. Ends with 0 when every program was judged, whatever the verdict; with 3 when one was
    not; with 2 on bad input.
    """
    from potstill.commands.sandbox import UNSAFE, NamedTask, backend_of, grade_all, line_of, task_of, tasks_of
    from potstill.sandbox.verdict import Limits

    limits = Limits(time_s=time_s, memory_mb=memory_mb)
    if (file is None) == (jobs is None):
        raise UserError("give FILE, or --jobs F: one of the two")
    if jobs is not None and (stdin or expect or tests):
        raise UserError("--jobs brings its own tests; leave --stdin, --expect and --tests out")
    tasks = tasks_of(jobs) if jobs is not None else [NamedTask("", task_of(file or Path(), stdin, expect, tests))]
    chosen = backend_of(backend, unsafe, workers)
    if wrong := [named.task for named in tasks if isinstance(named.task, str)]:
        told = f"{len(wrong)} of {len(tasks)} lines are no jobs, and get the verdict abstain; the first: {wrong[0]}"
        click.echo(told, err=True)
    if unsafe:
        click.secho(UNSAFE, err=True, fg="red")

    def say(named: NamedTask, grade: "Grade") -> None:
        if jobs is not None:
            click.echo(json.dumps({"id": named.ident, **line_of(grade)}))
        elif as_json:
            click.echo(json.dumps(line_of(grade)))
        else:
            click.echo(f"{grade.outcome}  {grade.wall_s:.3f} s{f'  {grade.reason}' if grade.reason else ''}")

    if not grade_all(tasks, chosen, limits, workers, say):
        sys.exit(3)


def shipped_folder() -> Path:
    """The recipes that come with the package, or with the checkout it is run from."""
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parent.parent / "recipes"):
        if (folder / "quickstart.toml").is_file():
            return folder
    raise UserError("the package lacks its recipes; install it again")


def shipped(name: str) -> Path:
    """A shipped recipe's file; it need not exist."""
    return shipped_folder() / name


def _recipe_path(path: Path) -> Path:
    """The file itself, or a shipped recipe of that name (`small/dolly-en`)."""
    if path.exists() or path.is_absolute():
        return path
    found = shipped(f"{path}" if path.suffix == ".toml" else f"{path}.toml")
    return found if found.is_file() else path


def _spread(processes: int) -> None:
    """Run the same command in several processes, unless this process is one of them."""
    from potstill.edges import ranks

    if processes > 1 and ranks.world() == 1:
        with click.get_current_context().obj.deaf():  # they save and say so; who started them waits for as long as that takes
            status = ranks.launch(["--module", "potstill", *sys.argv[1:]], processes)
        sys.exit(status)


def _run(recipe: "Callable[[], Recipe]", out: Path | None, quiet: bool, as_json: bool) -> "Mapping[str, Artifact]":
    """What was made, by stage; nothing in a process that is not the first."""
    import shlex

    from potstill.core.progress import Progress
    from potstill.edges import ranks
    from potstill.run.runner import run_recipe

    command = shlex.join(["potstill", *sys.argv[1:]])
    with ranks.joined():  # under torchrun a mistake in the recipe, too, is reported once
        found = recipe()
        folder = out or Path("runs") / found.name
        progress = Progress("quiet" if quiet else "auto")
        done = run_recipe(found, folder, progress=progress, command=command, stopper=click.get_current_context().obj)
    if not ranks.first():
        return {}
    if any(artifact.makes == "report" for artifact in done.values()):
        _show_report(folder, as_json)
    elif as_json:
        click.echo(json.dumps({ident: str(artifact.folder) for ident, artifact in done.items()}, indent=2))
    else:
        for ident, artifact in done.items():
            click.echo(f"{ident:<14} {artifact.folder}")
    return done


def _say_next(done: "Mapping[str, Artifact]") -> None:
    """How to use what the quickstart made; what it leaves out, and why that cannot be had where no sandbox is safe."""
    import shlex

    from potstill.edges.llamacpp import runtime_problem
    from potstill.scorers import programs

    exports = [artifact for artifact in done.values() if artifact.makes == "export"]
    files = [artifact.folder / name for artifact in exports for name in artifact.summary["files"] if name.endswith(".gguf")]
    for file in files:
        absent = runtime_problem()
        click.echo(f"next: talk to the 4-bit file: potstill chat {shlex.quote(str(file))}" + (f" ({absent})" if absent else ""))
        run = shlex.quote(str(file.parent.parent.parent))
        click.echo(f"next: compare its models side by side on a page: potstill serve {run}")
    click.echo(f"next: reasoning by GRPO, judged by programs that run: potstill run {GRPO_RECIPE} (docs/grpo.md)")
    try:
        programs.sandbox()
    except UserError as error:
        click.echo(f"not here yet: {error}")


def _say_leftovers(recipe: "Recipe", out: Path) -> None:
    from potstill.core.artifact import held_by
    from potstill.run.folder import leftover_lines, leftovers
    from potstill.run.graph import in_use, plan

    holder = held_by(out / ".lock")
    if holder is not None:
        click.echo(f"{out} is in use by {holder}")
        return
    for line in leftover_lines(leftovers(out, in_use(plan(recipe, out, offline=True)))):
        click.echo(line)


def _show_report(folder: Path, as_json: bool) -> None:
    from potstill.run.reports import report_of

    found, page = report_of(folder)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    from potstill.report.table import print_table

    print_table(found, Console(width=None if sys.stdout.isatty() else 110))
    click.echo(f"\n{page}")
