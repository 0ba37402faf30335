"""The files for Slurm and KubeRay: they parse, and name commands and options that there are."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path

import click
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from simulations.cli import fedlora, main
from tests.simulations.ray_stops import MARK, running

ROOT = Path(__file__).parent.parent.parent
PROGRAMS: dict[str, click.Group] = {"fedlora": fedlora, "ray": ray_cli}
SLURM = {"srun", "scontrol"}
KNOWN = {"--nodes", "--ntasks", "--cpus-per-task", "--overlap", "--nodelist"}  # of srun


def written(folder: Path, kind: str, *options: str) -> str:
    path = folder / f"{kind}-{len(options)}"
    assert main(["cluster", "init", kind, str(path), *options]) == 0
    text = path.read_text()
    assert not re.search(r"@[A-Z]+@", text)
    return text


def check(command: str) -> None:
    """Hold one command line to what our and Ray's commands take."""
    words = shlex.split(command)
    program = PROGRAMS[words[0]]
    assert words[1] in program.commands, command
    taken = {name for one in program.commands[words[1]].params for name in one.opts}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given and given <= taken, (command, given - taken)


def commands(text: str) -> list[str]:
    """What a script runs of Ray and of us, a command each."""
    joined = re.sub(r"#.*", "", text.replace("\\\n", " "))
    found = re.findall(r"\b((?:fedlora run|ray start|ray status) [^;)&>\n]*)", joined)
    return [re.sub(r'"\$\{@:2\}"', "", one).strip() for one in found]


def test_the_slurm_script_parses_and_its_commands_exist(tmp_path: Path) -> None:
    text = written(tmp_path, "slurm", "--recipe", "tiny", "--nodes", "3", "--gpus", "2")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    assert (asked["nodes"], asked["gpus-per-node"], asked["mem"]) == ("3", "2", "16G")
    found = commands(text)
    assert [one.split()[:2] for one in found] == [
        ["ray", "start"],
        ["ray", "status"],
        ["fedlora", "run"],
        ["fedlora", "run"],
    ]
    for one in found:
        check(one)
    for step in re.findall(r"start_ray (.*)", text):
        check("ray start " + step.partition(" ")[2].split(" #")[0])
    (srun,) = re.findall(r"srun (.*)\\", text)
    assert set(re.findall(r"--[\w-]+", srun)) == KNOWN
    assert "launch.num_gpus=1" in text
    assert "gpu" not in written(tmp_path, "slurm").lower()


def test_the_kuberay_job_is_yaml_and_its_commands_exist(tmp_path: Path) -> None:
    options = ["--image", "registry.example/fedlora:1", "--gpus", "4", "--cpus", "16"]
    job, claim = yaml.safe_load_all(written(tmp_path, "kuberay", "--nodes", "5", *options))
    assert (job["apiVersion"], job["kind"], claim["kind"]) == (
        "ray.io/v1",
        "RayJob",
        "PersistentVolumeClaim",
    )
    spec = job["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == metadata.version("ray")
    bash, flag, script = shlex.split(job["spec"]["entrypoint"])
    assert (bash, flag) == ("bash", "-c")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert len(commands(script)) == 2
    for one in commands(script):
        check(one)
    for name, value in spec["headGroupSpec"]["rayStartParams"].items():
        check(f"ray start --{name}={value}")
    (group,) = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (5, 1, 5)
    (container,) = group["template"]["spec"]["containers"]
    assert container["image"] == options[1]
    limits = {"cpu": "16", "memory": "16Gi", "nvidia.com/gpu": "4"}
    assert container["resources"] == {"requests": limits, "limits": limits}
    (volume,) = spec["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "gpu" not in written(tmp_path, "kuberay").lower()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["slrum", "f"], "cluster: found 'slrum', allowed: kuberay, slurm (did you mean 'slurm'?)"),
        (["slurm", "f", "--recipe", "tinny"], "did you mean 'tiny'?"),
        (["slurm", "f", "--nodes", "0"], "'--nodes': 0 is not in the range"),
        (["kuberay", "f", "--image", "a b"], "--image: found 'a b'"),
        (["slurm", "there"], "there: there is one already"),
        (["slurm", "nowhere/f"], "nowhere/f: cannot be written"),
    ],
)
def test_mistakes(
    argv: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("mine")
    assert main(["cluster", "init", *argv]) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "mine"


def test_commands_for_machines_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) if "ray start" in b]
    found = commands(block)
    assert [one.split()[:2] for one in found][:2] == [["ray", "start"]] * 2 and len(found) == 3
    for one in found:
        check(one)


@pytest.mark.slow
@pytest.mark.ray
def test_the_slurm_script_runs_and_goes_on(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands: two nodes that are both this machine."""
    stubs = {
        "scontrol": "#!/bin/sh\nprintf 'one\\ntwo\\n'\n",
        "srun": '#!/bin/sh\nwhile case "$1" in --*) true;; *) false;; esac; do shift; done\n'
        'exec "$@"\n',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = tmp_path / "run.sh"
    options = ["--recipe", "tiny", "--cpus", "1"]
    assert main(["cluster", "init", "slurm", str(path), *options]) == 0
    mark = uuid.uuid4().hex
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "x",
        "SLURM_CPUS_PER_TASK": "1",
    }
    environment = {
        **os.environ,
        **slurm,
        "SLURM_JOB_ID": str(os.getpid()),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VENV": sys.prefix,
        "OUT": str(tmp_path / "out"),
        MARK: mark,
    }
    try:
        for said in ("round 2/2", "finished already"):
            done = subprocess.run(
                ["bash", str(path)], env=environment, capture_output=True, text=True, timeout=500
            )
            assert done.returncode == 0 and said in done.stderr, done.stderr
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["rounds"] == 2
    finally:
        for process in running(mark):
            os.kill(process, signal.SIGKILL)
