"""The house rules that a test can hold: which way the arrows point, who commits, what the web process loads."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from app.settings import PROJECT

HEAVY = ("torch", "transformers", "peft", "accelerate")
WEB_MEMORY_LIMIT_BYTES = 150 * 10**6
WEB_IMPORT_LIMIT = 1.3  # times the import of the libraries alone
"""Of the processor: on a machine that is busy with other things the clock on the wall says nothing."""

GROUND = {"settings", "errors", "ids", "events", "tables", "shapes", "storable", "impatient"}
MIDDLE = {"strategies", "formats", "db", "queue"}
PURE = {"spec", "run_settings", "chat_templates", "optimizers", "estimate", "estimate_memory", "advisor", "progress"}
HTTP = {
    "main",
    "routes",
    "web",
    "shell",
    "middleware",
    "answers",
    "accounts",
    "pages",
    "logs",
    "multipart",
    "streams",
    "watch",
    "openapi",
    "well_formed",
}
TOP = {"main", "routes", "cli", "embedded", "relay", "doctor"}


def sources(folder: str) -> list[Path]:
    return sorted((PROJECT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, module_level: bool = False) -> Iterator[str]:
    """Full names of what a file imports, also inside functions unless `module_level`."""
    tree = ast.parse(path.read_text())
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in outside_functions(tree) if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported; what stands under `if TYPE_CHECKING` does not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from outside_functions(node)


def neighbours(path: Path) -> set[str]:
    """First names under `app` that a file imports: {'settings', 'strategies', …}."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("app.") and len(name.split(".")) > 1}


def files_of(names: set[str]) -> list[Path]:
    return [path for path in sources("app") if path.relative_to(PROJECT / "app").with_suffix("").parts[0] in names]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT / "app").with_suffix("").parts[0]


def forbidden(paths: list[Path], allowed: set[str]) -> list[str]:
    return [
        f"{path.relative_to(PROJECT)} imports app.{name}"
        for path in paths
        for name in sorted(neighbours(path) - allowed - {name_of(path), "__version__"})
    ]


def test_the_ground_stands_on_nothing():
    assert forbidden(files_of(GROUND), GROUND) == []


def test_strategies_formats_and_the_database_know_only_the_ground():
    assert forbidden(files_of(MIDDLE), GROUND | MIDDLE) == []


def test_what_is_pure_knows_no_service():
    assert forbidden(files_of(PURE), GROUND | MIDDLE | PURE | {"machine"}) == []


def test_nobody_imports_the_top():
    services = [path for path in sources("app") if name_of(path) not in TOP]
    found = [f"{path.relative_to(PROJECT)} imports app.{name}" for path in services for name in sorted(neighbours(path) & TOP)]
    assert found == []


def test_only_main_imports_routes():
    found = [
        str(path.relative_to(PROJECT))
        for path in sources("app")
        if "routes" in neighbours(path) and name_of(path) not in ("main", "routes")
    ]
    assert found == []


def test_services_know_no_http():
    services = [path for path in sources("app") if name_of(path) not in HTTP | TOP | {"db"}]
    found = [
        f"{path.relative_to(PROJECT)} imports {name}"
        for path in services
        for name in imports(path)
        if name.split(".")[0] in ("fastapi", "starlette") and name != "starlette.concurrency.run_in_threadpool"
    ]
    assert found == []


def test_nothing_imports_the_worker():
    found = [
        f"{path.relative_to(PROJECT)} imports {name}" for path in sources("app") for name in imports(path) if name.split(".")[0] == "worker"
    ]
    assert found == []


def test_the_worker_knows_no_web():
    found = [
        f"{path.relative_to(PROJECT)} imports {name}"
        for path in sources("worker")
        for name in imports(path)
        if name.split(".")[0] in ("fastapi", "starlette")
        or name.startswith(("app.routes", "app.main", "app.web.templates", "app.cli", "app.ops.embedded"))
    ]
    assert found == []


def test_app_imports_nothing_heavy_at_module_level():
    found = [
        f"{path.relative_to(PROJECT)} imports {name}"
        for path in sources("app")
        for name in imports(path, module_level=True)
        if name.split(".")[0] in HEAVY
    ]
    assert found == []


def test_only_db_commits():
    """`session.commit()` anywhere else in app/ would end a transaction that is not its own."""
    found = [
        f"{path.relative_to(PROJECT)}:{node.lineno}"
        for path in [*sources("app"), *sources("worker")]
        if path != PROJECT / "app" / "db.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "commit"
    ]
    assert found == []


def test_the_finder_finds(tmp_path):
    """The tests above would pass on an empty list too; this one shows that an arrow pointing up is seen."""
    wrong = PROJECT / "app" / "settings.py"
    tree = "from app.routes import jobs\ndef f():\n    import torch\nfrom . import cli\nfrom app import main"
    names = []

    class Fake(type(wrong)):  # the file's place, with other words in it
        def read_text(self, *args, **kwargs):
            return tree

    names = list(imports(Fake(wrong)))
    assert names == ["app.routes.jobs", "app.cli", "app.main", "torch"]
    assert "torch" not in list(imports(Fake(wrong), module_level=True))


BLOCKED_IMPORT = """
import json, resource, sys, time
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError(f"{{name}} is blocked in the web process")
sys.meta_path.insert(0, Blocked())
start = time.process_time()
from app.main import create_app
seconds = time.process_time() - start
create_app()
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[1])
print(json.dumps({{"seconds": seconds, "bytes": pages * resource.getpagesize(), "modules": len(sys.modules)}}))
"""


def import_the_web_process() -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT.format(heavy=HEAVY)],
        cwd=PROJECT,
        env={
            **os.environ,
            "LUTHIER_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none",
            "LUTHIER_REDIS_URL": "redis://127.0.0.1:1/0",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


LIBRARIES = """
import time
start = time.process_time()
import fastapi, sqlalchemy.orm, sqlalchemy.dialects.postgresql, psycopg, pydantic_settings, redis, celery, jinja2, httpx, structlog
import prometheus_client
print(time.process_time() - start)
"""


def import_the_libraries() -> float:
    return float(subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, timeout=120, check=True).stdout)


def test_the_web_process_needs_no_torch_and_little_memory(data_dir, capsys):
    figures = import_the_web_process()
    with capsys.disabled():
        print(
            f"\nweb process: imports in {figures['seconds']:.2f} s of a processor, {figures['bytes'] / 1e6:.0f} MB, {figures['modules']} modules"
        )
    assert figures["bytes"] < WEB_MEMORY_LIMIT_BYTES
    # In turn with the libraries it stands on, in the same run: machines differ, and the same one from hour to hour.
    took = [(import_the_web_process()["seconds"], import_the_libraries()) for _ in range(3)]
    web, libraries = (min(seconds) for seconds in zip(*took, strict=True))
    assert web < WEB_IMPORT_LIMIT * libraries, f"the web process imports in {web:.2f} s, its libraries in {libraries:.2f} s"


def test_compose_runs_what_luthier_up_runs(data_dir):
    import yaml

    from app.ops.embedded.up import commands
    from app.settings import get_settings

    compose = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
    services = compose["services"]
    ours = {name: ["python", "-m", *command] for name, command in commands(get_settings()).items()}
    ours["web"] = [{"127.0.0.1": "0.0.0.0"}.get(part, part) for part in ours["web"]]
    assert set(services) == {*ours, "postgres", "valkey", "migrate"}
    for name, command in ours.items():
        assert [str(part) for part in services[name]["command"]] == command, name
        assert services[name]["environment"]["LUTHIER_DATABASE_URL"].endswith("@postgres/luthier")
    assert services["postgres"]["image"] == "postgres:18"
    assert all("healthcheck" in services[name] for name in ("postgres", "valkey", "web"))
    volumes = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert volumes == set(compose["volumes"])


def test_compose_holds_no_secret():
    """Every password in it is a reference to .env."""
    import re

    text = (PROJECT / "docker-compose.yml").read_text()
    for line in text.splitlines():
        found = re.search(r"PASSWORD: (\S+)", line)
        assert not found or found.group(1).startswith("${"), line
    assert "luthier:${POSTGRES_PASSWORD" in text


def test_the_images_start_what_compose_starts():
    import yaml

    text = (PROJECT / "Dockerfile").read_text()
    services = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    started = [json.loads(line.removeprefix("CMD ")) for line in text.splitlines() if line.startswith("CMD ")]
    assert started == [[str(part) for part in services[name]["command"]] for name in ("web", "train")]
    for line in text.splitlines():
        if line.startswith("COPY "):
            for name in line.split()[1:-1]:
                assert (PROJECT / name).exists(), name
