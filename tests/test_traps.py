import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_mistake_is_guarded_or_listed_as_open():
    listed = (HERE / "traps.md").read_text()
    numbers = [int(row) for row in re.findall(r"^\| (\d+) \|", listed, flags=re.MULTILINE)]
    rows = set(numbers)
    still_open = {int(row) for row in re.findall(r"^- (\d+):", listed, flags=re.MULTILINE)}
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    guarded = {int(row) for row in re.findall(r"mark\.trap\((\d+)\)", tests)}
    assert numbers == list(range(1, len(numbers) + 1))
    assert guarded | still_open == rows
    assert not guarded & still_open
