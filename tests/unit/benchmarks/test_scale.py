"""The tables of docs/scale.md."""

from benchmarks import scale


def test_the_page_is_what_the_formula_gives():
    written = scale.PAGE.read_text(encoding="utf-8").split(scale.BEGIN)[1].split(scale.END)[0]
    assert written.strip() == scale.tables().strip()


def test_the_shapes_of_many_layers_are_those_of_the_model():
    config = scale.config_of("124M")
    objective = scale.LanguageModelingObjective(config, scale.VOCABULARY, scale.numerics_of(config))
    shapes = scale.shapes_of("124M")
    assert {name: x.shape for name, x in shapes.items()} == {n: x.shape for n, x in objective.param_shapes.items()}


def test_a_state_that_is_sharded_further_takes_less_and_sends_the_same():
    whole, sharded, further = (scale.footprint_of("7B", 1, fsdp) for fsdp in (1, 8, 64))
    assert whole.state > 7.9 * sharded.state > 60 * further.state
    assert sharded.all_gather == further.all_gather and whole.all_gather == 0
    assert scale.footprint_of("7B", 128, 8).state == sharded.state
