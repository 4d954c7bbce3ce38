"""Trainer with AnalogCallback."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny import llama, recipe
from transformers import Trainer, TrainingArguments

import analogfx
from analogfx.hf import AnalogCallback

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = torch.randint(3, 64, (16, 8), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in ROWS]


def arguments(folder, **options):
    usual = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(str(folder), **(usual | options))


def analog_llama(noise=True):
    torch.manual_seed(1)
    config = recipe(init_from_data=24)
    if not noise:
        config.modifier.noise_type = analogfx.WeightNoiseInjectionType.NONE
    return analogfx.analogize(llama(), config)


def trainer(folder, callbacks=None, model=None, **options):
    model = analog_llama() if model is None else model
    callbacks = [AnalogCallback()] if callbacks is None else callbacks
    data = {"train_dataset": DATA, "eval_dataset": DATA[:4]}
    return Trainer(model, arguments(folder, **options), **data, callbacks=callbacks)


WAYS = {
    "alone": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bfloat16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_resumed_training_is_bit_equal(way, tmp_path):
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10} | WAYS[way]
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    expected = whole.model.state_dict()
    forwards = 20 * options.get("gradient_accumulation_steps", 1)
    assert expected["lm_head.input_range_update_idx"] == min(forwards, 24)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_it_trains_as_a_loop_does(tmp_path):
    run = trainer(
        tmp_path, model=analog_llama(noise=False), max_steps=4, lr_scheduler_type="constant",
        max_grad_norm=0.0, optim="adamw_torch", gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    run.train()
    model = analog_llama(noise=False).train()
    decaying, kept = analogfx.parameter_groups(model, 0.1)
    norms = {id(p) for name, p in model.named_parameters() if "norm" in name}
    groups = [
        {"params": [p for p in decaying["params"] if id(p) not in norms], "weight_decay": 0.1},
        {"params": [p for p in decaying["params"] if id(p) in norms], "weight_decay": 0.0},
        kept,
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    analogfx.prepare_training(optimizer, model)
    for step in range(4):
        for rows in ROWS[4 * step : 4 * step + 4].split(2):
            (model(input_ids=rows, labels=rows).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_best_model_comes_back_with_its_ranges(tmp_path):
    run = trainer(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, learning_rate=0.5,
    )  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint
    assert best and not best.endswith("-4")
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)
    found = type(run.model).from_pretrained(best)
    for name, value in found.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


def test_when_training_ends_all_of_it_ends(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    model, optimizer = run.model, run.optimizer.optimizer
    assert model.lm_head.input_range_update_idx == 1
    model.train()(**run.data_collator(DATA[:2]))
    assert model.lm_head.input_range_update_idx == 2
    assert not optimizer._optimizer_step_pre_hooks
    names = [hook.__qualname__ for hook in optimizer._optimizer_step_post_hooks.values()]
    assert not [name for name in names if "decay" in name or "clip" in name]


REASONS = {
    "weights are not clipped": {"weight_decay": 0.0},
    "weight decay shrinks input ranges": {},
    "is added once a micro-batch": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("reason", REASONS)
def test_trainer_alone_is_told(reason, tmp_path):
    run = trainer(tmp_path, callbacks=[], max_steps=2, **REASONS[reason])
    with pytest.warns(UserWarning, match=f"without analogfx.hf.AnalogCallback.*{reason}") as found:
        run.train()
    assert len(found) == 1


def test_trainer_with_a_digital_model_is_told_nothing(tmp_path):
    trainer(tmp_path, callbacks=[], model=llama(), max_steps=1).train()
    with pytest.raises(TypeError, match="LlamaForCausalLM has no analog layer"):
        trainer(tmp_path, model=llama(), max_steps=1).train()
