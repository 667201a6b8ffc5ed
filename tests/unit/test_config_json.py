"""config.json: the task that it names, and files written before it named one."""

import json

import pytest

from jaxgpt.config import FinetuneConfig, ModelConfig, TrainConfig, differences, from_json, to_json
from jaxgpt.errors import UserError

BOTH = pytest.mark.parametrize(
    "config, task",
    [(TrainConfig(), "language_modeling"), (FinetuneConfig(model=ModelConfig(), pool="mean"), "classification")],
)


def test_the_defaults_of_fine_tuning_are_as_documented():
    c = FinetuneConfig(model=ModelConfig())
    assert (c.lr, c.decay, c.batch_size, c.epochs, c.max_tokens, c.pool) == (1e-4, 0.01, 32, 5, 64, "last")
    assert (c.beta1, c.beta2, c.clip, c.schedule, c.decay_mask) == (0.9, 0.999, 0.0, "constant", "all")


@BOTH
def test_the_round_trip(config, task):
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@BOTH
def test_the_task_is_named(config, task):
    assert to_json(config)["task"] == task


@BOTH
def test_a_file_without_a_task_gives_the_same_configuration(config, task):
    values = to_json(config)
    del values["task"]
    assert differences(from_json(values), config) == []


def test_another_task_is_refused():
    with pytest.raises(UserError, match="another version: its task is translation"):
        from_json({**to_json(TrainConfig()), "task": "translation"})


def test_a_task_with_the_fields_of_another_is_refused():
    with pytest.raises(UserError, match="another version: it has the fields .*pool"):
        from_json({**to_json(FinetuneConfig(model=ModelConfig())), "task": "language_modeling"})
