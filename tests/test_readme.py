"""README cannot rot: its quick commands run, its names exist, its figures are there, and it stays short."""
import re
import shlex
import shutil
import sys
from pathlib import Path

import soundfile as sf

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_quick_commands_and_snippets_run_as_they_stand(tmp_path, monkeypatch):
    """Every fenced block marked `quick`, in order, in a folder that holds the weights, music/ and song.ogg."""
    import data
    import probe
    from conftest import wave_of
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests" / "weights", "tests/weights")
    Path("music").mkdir()
    for i in range(3):
        sf.write(f"music/{i}.ogg", wave_of(i)[:5 * data.SAMPLE_RATE], data.SAMPLE_RATE)
    shutil.copy("music/0.ogg", "song.ogg")
    monkeypatch.setattr(probe, "save_figure", lambda plt, figure, path: plt.close(figure))  # test_show.py looks at them
    blocks = re.findall(r"^```(sh|python) quick\n(.*?)^```", README, flags=re.S | re.M)
    assert len(blocks) >= 2
    for language, text in blocks:
        if language == "python":
            exec(text, {})
            continue
        for line in text.splitlines():
            python, file, *words = shlex.split(line, comments=True)
            assert (python, file) == ("python", "probe.py")
            monkeypatch.setattr(sys, "argv", [file, *words])
            probe.main()


LINK = re.compile(r"\[`(\w+)`\]\((\w+\.py)#L\d+\)")


def at_its_line(link):
    """A link to a name of the code, with the line where that name is defined today."""
    name, file = link.groups()
    defined = [i for i, line in enumerate((ROOT / file).read_text().splitlines(), 1) if re.match(rf"(def|class) {name}\b|{name} =", line)]
    return f"[`{name}`]({file}#L{defined[0]})"


def test_links_lead_to_the_lines_they_name():
    assert len(LINK.findall(README)) >= 10
    for link in LINK.finditer(README):
        assert link[0] == at_its_line(link), "run: python tests/test_readme.py"
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / figure).exists(), figure


def test_every_flag_and_command_it_names_exists():
    known = set()
    for file in ("data.py", "train.py", "probe.py", "tests/curves.py", "tests/publish.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / file).read_text()))
    known |= {"--no-probe", "--no-compile"}
    torchrun, elsewhere = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}, {"--quiet", "--requirement"}
    assert set(re.findall(r"(?<![\w-])--[a-z_-]+[a-z]", README)) <= known | torchrun | elsewhere


if __name__ == "__main__":  # lines have moved: set the links of README anew
    (ROOT / "README.md").write_text(LINK.sub(at_its_line, README))
