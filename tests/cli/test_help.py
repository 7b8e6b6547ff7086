import os
import subprocess
import sys
import textwrap

HEAVY = ("torch", "timm", "optuna", "peft", "transformers", "scipy", "sklearn", "plotly")


def python(code, *args):
    env = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, env=env, check=False
    )


def test_help_imports_nothing_heavy():
    code = f"""
        import sys
        from autopeft.cli.main import app
        try:
            app(["--help"])
        except SystemExit as end:
            assert end.code in (0, None), end.code
        loaded = [name for name in {HEAVY} if name in sys.modules]
        assert not loaded, loaded
    """
    done = python(code)
    assert done.returncode == 0, done.stderr
    for verb in [
        "search",
        "plan",
        "train",
        "eval",
        "export",
        "compress",
        "report",
        "dashboard",
        "inspect",
        "resume",
        "worker",
        "doctor",
        "study",
    ]:
        assert f" {verb} " in done.stdout, verb


MEASURE = """
    import sys, time
    start = time.process_time()
    if sys.argv[1] == "ours":
        from autopeft.cli.main import app
    else:
        import typer
        app = typer.Typer()
        @app.command()
        def one(): "The first."
        @app.command()
        def two(): "The second."
    try:
        app(["--help"])
    except SystemExit:
        pass
    print(time.process_time() - start, file=sys.stderr)
"""


def test_help_takes_at_most_half_again_of_an_empty_app():
    # Processor time, paired, median of the ratios: what else the machine does disturbs single runs.
    ratios = []
    for _ in range(9):
        ours, empty = (float(python(MEASURE, which).stderr.split()[-1]) for which in ("ours", "empty"))
        ratios.append(ours / empty)
    assert sorted(ratios)[4] <= 1.5, ratios


def test_every_command_has_help_without_heavy_imports():
    code = f"""
        import sys
        from autopeft.cli.main import app
        for verb in "search plan train eval export compress report dashboard inspect resume worker doctor".split():
            try:
                app([verb, "--help"])
            except SystemExit as end:
                assert end.code in (0, None), (verb, end.code)
        loaded = [name for name in {HEAVY} if name in sys.modules]
        assert not loaded, loaded
    """
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "--budget" in done.stdout
    assert "[KEY.PATH=VALUE]" in done.stdout


def test_the_list_of_commands_says_what_the_commands_say():
    code = """
        import importlib
        from autopeft.cli.lazy import COMMANDS
        for name, (target, line) in COMMANDS.items():
            module, _, attribute = target.partition(":")
            found = getattr(importlib.import_module(module), attribute)
            says = found.info.help if hasattr(found, "info") else found.__doc__.strip().splitlines()[0]
            assert says == line, (name, says, line)
    """
    done = python(code)
    assert done.returncode == 0, done.stderr
