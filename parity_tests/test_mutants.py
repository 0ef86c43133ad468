"""What scripts/mutants is told: modules and tests that there are, and which mutants say something."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEANT = runpy.run_path(str(ROOT / "scripts" / "mutants_meant.py"))


@pytest.mark.parametrize("name", MEANT["MODULES"])
def test_there_are_the_module_and_its_tests(name):
    module, tests = MEANT["MODULES"][name]
    assert (ROOT / "deepseek_jax" / module).is_file()
    for test in tests.split():
        file, _, function = test.partition("::")
        text = (ROOT / "parity_tests" / file).read_text()
        assert not function or f"\ndef {function.partition('[')[0]}(" in text, test


def test_annotations_and_messages_are_left_alone():
    lines = ["@dataclass(frozen=True)", "class A:", "    x: int | None = 1 | 2", "def f(a: 'B | 4' = 3) -> int | None:",
             "    raise ValueError(f'{1 + 2}')"]  # fmt: skip
    source, number = "\n".join(lines), "core/NumberReplacer"

    def columns(operator: str, line: int) -> str:
        return "".join(c for i, c in enumerate(lines[line - 1]) if MEANT["is_meant"](operator, (line, i), source))

    assert columns(number, 1) == "@dataclass()" and columns(number, 3) == "    x:  = 1 | 2"
    assert columns(number, 4) == "def f(a:  = 3) -> :" and columns(number, 5) == "    "
    assert columns("core/ReplaceBinaryOperator_BitOr_LShift", 3) == ""
