"""A model that fits no card: PyTorch's FSDP with QLoRA, as README.md's details describe it.

As a program, started in several processes: shard a tiny base model in NF4 with LoRA, and train.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from lora_models import lora_config, save_tiny
from peft import get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig


@pytest.mark.slow
def test_two_processes_hold_half_of_a_model_each_and_train_it_as_one_does(tokenizer, tmp_path):
    folder = save_tiny(LlamaConfig, tokenizer, tmp_path / "tiny")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    losses = []
    for count in ("1", "2"):
        command = [sys.executable, *launch, count, __file__, str(folder)]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        losses.append([float(loss) for loss in re.findall(r"^loss (\S+)$", done.stdout, re.M)])
        shares = re.findall(r"^share (\S+)$", done.stdout, re.M)
        assert [float(share) for share in shares] == pytest.approx([1 / int(count)] * int(count))
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][2] < losses[0][0]


def main(folder: str) -> None:
    distributed.init_process_group("gloo")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,  # all that is sharded has one dtype
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit)
    torch.manual_seed(0)
    model = get_peft_model(model, lora_config(r=4))
    mesh = distributed.init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in [*model.get_base_model().model.layers, model]:
        fully_shard(layer, mesh=mesh)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    ids = torch.arange(32).view(2, 16)
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if distributed.get_rank() == 0:
            print(f"loss {loss.item()}", flush=True)
    here = sum(p.to_local().numel() for p in model.parameters())
    shares = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, here / sum(p.numel() for p in model.parameters()))
    if distributed.get_rank() == 0:  # two that print at once may share a line
        print(*(f"share {share}" for share in shares), sep="\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
