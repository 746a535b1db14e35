"""Every recorded study is complete: its script would make no run, and the records are those that it asks for."""

import importlib.util

import pytest
from helpers.studies import DATA, load_study

from lorakit.experiments.records import expand, frame, read_records, survey

FOLDERS = sorted(path.parent for path in DATA.glob("*/record.py"))


class Asked:
    """In place of `sweep`: remembers which settings a script wants where, and makes none."""

    def __init__(self):
        self.settings = {}

    def __call__(self, run, grid, folder, **options):
        settings = expand(grid)
        assert survey(folder, settings).missing == [], f"{folder.name} lacks runs"
        assert set(options.get("together", ())) <= set(settings[0])
        assert options["command"].startswith(f"python data/{folder.parent.name}/record.py")
        self.settings.setdefault(folder, []).extend(settings)
        return frame(folder, settings)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_study_is_complete_and_holds_nothing_else(folder, monkeypatch):
    study, asked = load_study(folder.name), Asked()
    monkeypatch.setattr(study, "sweep", asked)
    study.main()
    held = {path.parent for path in folder.glob("*/*.json")}
    assert held == set(asked.settings)
    for records, settings in asked.settings.items():
        assert len(read_records(records)) == len(list(records.glob("*.json"))), "a record is damaged"
        assert len(list(records.glob("*.json"))) == len({repr(sorted(each.items())) for each in settings})


def test_every_folder_of_records_belongs_to_a_study():
    assert {folder.name for folder in FOLDERS} == {
        "against_full",
        "intrinsic",
        "lowrank",
        "merging",
        "methods",
        "qlora",
        "sft",
        "untrained",
    }
    assert not [path for path in DATA.glob("*/results*.json")]
    assert importlib.util.find_spec("lorakit.experiments.recorded") is None
