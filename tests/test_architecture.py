"""Which module may import which, and what importing costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tracelens"

# Arrows point down only. Modules of one line do not import each other, packages and the audit's own modules aside.
LAYERS = [
    {"errors"},
    {"sites", "stats", "chat"},
    {"metrics", "output"},
    {"loading", "precision", "datasets", "organism", "hooks"},
    {"pair"},
    {"features", "causal", "directions", "behaviour"},
    {"audit", "audit_settings", "audit_report", "auditing", "optimization_auditor", "sweep_result", "studies"},
    {"views", "cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
TOGETHER = [LAYERS[6], LAYERS[7], {"features", "behaviour", "causal"}]
SCRIPTS = {
    path for path in PACKAGE.glob("organism/*.py") if path.stem in ("train", "train_saes", "card", "sae_card", "damage")
}
"""Run by `python -m`, imported by nothing: they stand on top of the package."""

FILES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"} - SCRIPTS)


def unit(module: str) -> str:
    """`tracelens.metrics.cpfr` → `metrics`."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Modules imported at the top of a file, and inside its functions; what is for type checkers only is left out."""
    top, lazy = set(), set()

    def walk(node: ast.AST, into: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                into.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                if child.module == "tracelens":
                    into.update(f"tracelens.{alias.name}" for alias in child.names if alias.name != "__version__")
                else:
                    into.add(child.module or "")
            walk(child, lazy if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else into)

    walk(ast.parse(path.read_text(encoding="utf-8")), top)
    return top, lazy


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    home = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert home in RANK, f"{home} has no place in LAYERS"
    top, lazy = ({unit(m) for m in found if m.split(".")[0] == "tracelens"} for found in imports(path))
    assert top | lazy <= RANK.keys(), "import from the module that defines it"
    together = {name for group in TOGETHER if home in group for name in group} | {home}
    upward = {name for name in top - together if RANK[name] >= RANK[home]}
    assert not upward, f"{home} imports {upward}"
    # What is imported on use may be a neighbour (the organism's files and their loader), and results open their views.
    far = {name for name in lazy - together - {"views"} if RANK[name] > RANK[home]}
    assert not far, f"{home} imports {far}"
    if "views" in lazy:
        assert home in together & {
            "audit",
            "audit_report",
            "sweep_result",
            "studies",
            "features",
            "causal",
            "views",
            "cli",
        }


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("metrics/*.py")), ids=lambda path: path.name)
def test_metrics_are_tensor_maths(path):
    top, lazy = imports(path)
    outside = {name.split(".")[0] for name in top | lazy} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "numpy", "scipy", "jaxtyping", "tracelens"}
    assert {unit(name) for name in top | lazy if name.startswith("tracelens")} <= {"metrics", "stats", "errors"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_where_they_are_used(path):
    heavy = {
        "transformer_lens",
        "sae_lens",
        "transformers",
        "plotly",
        "pandas",
        "matplotlib",
        "ipywidgets",
        "sklearn",
        "llmcompressor",
    }
    assert not {name.split(".")[0] for name in imports(path)[0]} & heavy


def test_scripts_are_imported_by_nothing():
    names = {f"tracelens.organism.{path.stem}" for path in SCRIPTS}
    for path in FILES:
        top, lazy = imports(path)
        assert not (top | lazy) & names, path


def loaded_by(statement: str) -> tuple[set[str], float]:
    """Top-level modules that a statement loads in a new process, and the seconds it takes."""
    code = (
        "import json, sys, time; start = time.perf_counter()\n"
        f"{statement}\n"
        "print(json.dumps([time.perf_counter() - start, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/").stdout
    seconds, modules = json.loads(out)
    return set(modules), seconds


def test_importing_tracelens_is_light():
    runs = [loaded_by("import tracelens") for _ in range(5)]
    heavy = {"torch", "transformer_lens", "sae_lens", "transformers", "pandas", "plotly", "scipy", "numpy"}
    assert not runs[0][0] & heavy
    assert min(seconds for _, seconds in runs) < 0.3


def test_metrics_load_no_model_library():
    modules, _ = loaded_by("import tracelens.metrics")
    assert not modules & {"transformer_lens", "sae_lens", "transformers", "plotly", "pandas"}


def test_names_resolve_and_are_listed():
    import tracelens

    for name in tracelens.__all__:
        assert getattr(tracelens, name) is not None
        assert name in dir(tracelens)
    with pytest.raises(AttributeError, match="no_such_name"):
        tracelens.no_such_name  # noqa: B018
