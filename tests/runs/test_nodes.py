"""More than one machine: two nodes of two ranks, each in a network namespace of its own with its
own address.
"""

import os
import subprocess
import sys
import uuid

import pytest
from safetensors.torch import load_file

from tests.helpers.tiny import ROOT, toy_world
from tests.runs.test_jobs import run

SFT = (
    "--rows_per_step=8",
    "--steps=3",
    "--save_interval=3",
    "--policy.tokens_per_microbatch=500",
    "--lr=1e-3",
    "--policy.checkpoint_activations=false",
    "--timeout_s=120",
)


def shell(*lines):
    for line in lines:
        subprocess.run(line.split(), check=True, capture_output=True)


@pytest.fixture(scope="module")
def nodes():
    """Names of two network namespaces, joined by a cable: 10.77.0.1 and 10.77.0.2."""
    mark = uuid.uuid4().hex[:6]
    a, b = f"ra{mark}", f"rb{mark}"
    try:
        shell(f"ip netns add {a}", f"ip netns add {b}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    shell(f"ip link add va{mark} netns {a} type veth peer name vb{mark} netns {b}")
    for name, link, address in ((a, f"va{mark}", "10.77.0.1"), (b, f"vb{mark}", "10.77.0.2")):
        inside = f"ip netns exec {name} ip"
        shell(
            f"{inside} addr add {address}/24 dev {link}",
            f"{inside} link set {link} up",
            f"{inside} link set lo up",
        )
    yield [(a, f"va{mark}"), (b, f"vb{mark}")]
    shell(f"ip netns del {a}", f"ip netns del {b}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = toy_world(tmp_path_factory.mktemp("world"))
    base = (f"--model={folder}/model", f"--data={folder}/sft.jsonl", *SFT)
    run("sft.py", *base, f"--out_dir={folder}/one")
    return folder, base, load_file(folder / "one" / "step-000003" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("shard_ranks", [0, 2], ids=["fsdp-across-nodes", "hsdp"])
def test_two_nodes_of_two_ranks_train_as_one_rank(nodes, world, tmp_path, shard_ranks):
    _, base, alone = world
    running = []
    for rank, (node, link) in enumerate(nodes):
        command = [
            "ip",
            "netns",
            "exec",
            node,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc_per_node=2",
            f"--node_rank={rank}",
            "--master_addr=10.77.0.1",
            "--master_port=29511",
            "sft.py",
            *base,
            f"--out_dir={tmp_path}/out",
            f"--policy.shard_ranks={shard_ranks}",
        ]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": link}
        pipe = subprocess.PIPE
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=subprocess.STDOUT
            )
        )
    texts = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], (
        texts[0][-2000:] + texts[1][-2000:]
    )
    together = load_file(tmp_path / "out" / "step-000003" / "model.safetensors")
    assert together.keys() == alone.keys()
    assert max((together[name] - alone[name]).abs().max().item() for name in alone) < 1e-5
