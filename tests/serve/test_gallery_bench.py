import re
import sys

import pytest

from scripts.bench.gallery import main


def test_the_gallery_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--videos", "120"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"first page of a cold index: \d\.\d{3} s, 48 videos", lines[0])
    assert re.search(r"a page of checkpoint=run3: .* s, 24 videos", lines[-2])
    assert re.fullmatch(r"memory: \d+ MiB before, \d+ MiB with all read, \d+ MiB after .*", lines[-1])
