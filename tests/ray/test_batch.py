# SPDX-License-Identifier: Apache-2.0
"""An offline job on Ray Data: killed in the middle, run again, nothing twice, nothing missing."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers.ray_app import PAGE, PLANS, shell
from helpers.readme import ENVIRONMENT, ROOT, block

from vllm_adaskip import engine_args
from vllm_adaskip.bundled import bundled_model
from vllm_adaskip.lab.testbed.tasks import TASKS, samples

#: Rows that cannot run, and words of their errors; the last one only the engine knows.
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"prompt": "sum", "vllm_xargs": {"adaskip_skip": [99]}}, ["adaskip_skip: 99", "0 to 11"]),
    ({"prompt": "sum", "vllm_xargs": {"adaskip_profile": "first"}}, ["adaskip_profile", "allowed"]),
    ({"vllm_xargs": {}}, ["prompt: None"]),
    ({"prompt": "sum " * 600}, ["maximum context length is 512"]),
]
ARGUMENTS: list[dict[str, Any] | None] = [
    *({"adaskip_skip": plan} for plan in PLANS),
    {"adaskip": "off"},
    {"adaskip_skip": [5], "adaskip_max_compute": 0.95},
    None,
]


def rows() -> list[dict[str, Any]]:
    questions = [one.prompt for task in TASKS for one in samples(task, "test", 7, 60)]
    good = [
        {"prompt": prompt, "vllm_xargs": ARGUMENTS[index % len(ARGUMENTS)]}
        for index, prompt in enumerate(questions)
    ]
    for place, (bad, _) in enumerate(BAD):
        good.insert(40 * place + 3, bad)
    return [{"id": f"row {number}", **row} for number, row in enumerate(good)]


class Job:
    """The page's own command, for files of a test, in float32 so that answers can be compared."""

    def __init__(self, folder: Path) -> None:
        self.answers = folder / "answers"
        source, config = folder / "prompts.jsonl", folder / "batch.yaml"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows()))
        settings = yaml.safe_load((ROOT / "deploy/ray/batch.yaml").read_text())
        settings["engine_kwargs"]["dtype"] = "float32"
        config.write_text(yaml.safe_dump({**settings, "part_rows": 32, "batch_rows": 8}))
        command = block("python -m deploy.ray.batch", PAGE).strip()
        for name, path in (
            ("prompts.jsonl", source),
            ("answers", self.answers),
            ("deploy/ray/batch.yaml", config),
        ):
            command = command.replace(f" {name}", f" {path}")
        self.command = command

    def parts(self) -> dict[str, tuple[int, str]]:
        """Return the parts that are there: when each was written, and what is in it."""
        found = sorted(self.answers.glob("part-*.jsonl"))
        return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in found}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("batch"))


@pytest.fixture(scope="module")
def killed(job: Job) -> dict[str, tuple[int, str]]:
    """Kill the job as soon as there is a part; give the parts that it leaves."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {job.command}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not job.parts():
        assert process.poll() is None, (process.communicate()[1] or b"")[-3000:].decode()
        time.sleep(0.05)
    all_of_it = psutil.Process(process.pid).children(recursive=True)
    engines = [one for one in all_of_it if "VLLM" in one.name()]
    process.kill()
    process.communicate()
    left = job.parts()
    # Engines notice by themselves that their job is gone; Ray's agents take their time.
    assert engines and not psutil.wait_procs(engines, timeout=60)[1]
    for one in psutil.wait_procs(all_of_it, timeout=0)[1]:
        one.kill()
    return left


def test_a_killed_job_goes_on_where_it_was(
    job: Job, killed: dict[str, tuple[int, str]], engine: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    given = rows()
    assert 0 < len(killed) < -(-len(given) // 32)
    shell(f"{job.command} 2>&1")
    parts = job.parts()
    assert {name: parts[name] for name in killed} == killed  # never written again
    answers = [json.loads(line) for _, text in parts.values() for line in text.splitlines()]
    assert [one["row"] for one in answers] == list(range(len(given)))
    assert [one["id"] for one in answers] == [row["id"] for row in given]

    wrong = [one for one in answers if one["error"] is not None]
    assert len(wrong) == len(BAD)
    for one, (_, words) in zip(wrong, BAD, strict=True):
        assert one["text"] is None and all(word in one["error"] for word in words)

    good = [(row, one) for row, one in zip(given, answers, strict=True) if one["error"] is None]
    llm = engine(
        bundled_model(),
        skip_tokenizer_init=False,
        max_model_len=512,
        **engine_args(kv_fill="copy"),
    )
    params = [
        SamplingParams(temperature=0, max_tokens=24, extra_args=row["vllm_xargs"])
        for row, _ in good
    ]
    outputs = llm.generate([row["prompt"] for row, _ in good], params, use_tqdm=False)
    assert [one["text"] for _, one in good] == [one.outputs[0].text for one in outputs]
    assert [one["tokens"] for _, one in good] == [len(one.outputs[0].token_ids) for one in outputs]
    dense = llm.generate(
        [row["prompt"] for row, _ in good],
        SamplingParams(temperature=0, max_tokens=24),
        use_tqdm=False,
    )
    assert [one.outputs[0].text for one in dense] != [one["text"] for _, one in good]


def test_run_a_third_time_it_does_nothing(job: Job) -> None:
    before = job.parts()
    start = time.monotonic()
    assert f"{len(rows())} were there" in shell(job.command)
    assert job.parts() == before and time.monotonic() - start < 60


def test_another_job_is_refused_there(job: Job) -> None:
    before = job.parts()
    with pytest.raises(AssertionError, match=r"max_tokens was 24, is 5"):
        config = Path(job.command.split()[-1])
        other = config.with_name("other.yaml")
        other.write_text(config.read_text() + "max_tokens: 5\n")
        shell(job.command.replace(str(config), str(other)))
    assert job.parts() == before
