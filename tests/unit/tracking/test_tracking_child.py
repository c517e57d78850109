"""What a process beside a trainer is told: nothing that makes it a rank, and no GPU."""

import os
import subprocess
import sys
from pathlib import Path

from bdtrain.tracking.child import child_environment

ROOT = Path(__file__).resolve().parents[3]


def test_nothing_of_a_launcher_reaches_a_child():
    trainer = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "SLURM_PROCID": "1",
        "OMPI_COMM_WORLD_RANK": "1",
        "PMI_RANK": "1",
        "PMIX_RANK": "1",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HOME": "/home/someone",
        "PYTHONPATH": "/mine",
    }
    found = child_environment(trainer, {"OMP_NUM_THREADS": "1"})
    path = os.pathsep.join([str(ROOT), "/mine"])
    expected = {
        "HOME": "/home/someone",
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    assert found == expected
    assert trainer["RANK"] == "1", "the trainer's own is left alone"
    assert child_environment({})["PYTHONPATH"] == str(ROOT)


def test_a_child_finds_the_package_wherever_it_works(tmp_path):
    (tmp_path / "bdtrain.py").write_text("raise SystemExit('a file of the user hides the package')")
    code = "import bdtrain, os; print(bdtrain.__path__[0], os.environ.get('RANK'))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=child_environment({**os.environ, "RANK": "3"}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [str(ROOT / "bdtrain"), "None"]
