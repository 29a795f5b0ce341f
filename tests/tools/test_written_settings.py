"""A run's settings, written and read again, are the same: in `config_resolved.yaml` and in `training_config.yaml`."""

import dataclasses

import yaml
from helpers import examples
from hypothesis import example, given
from hypothesis import strategies as st

from scalekd_hf.tools.recipe import DistillArguments, given_arguments, parse_config, resolved, write_config
from scalekd_hf.training.config import ScaleKDConfig
from scalekd_hf.training.facts import changed
from scalekd_hf.training.settings import rebuilding_settings


texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
words = st.one_of(
    texts, st.sampled_from(("no", "null", "1e-3", "-x", "--seed", "[1]", "{}", "a=b", "a: b", "'", "%s", "~"))
)
shares, rates = st.floats(0, 0.9), st.floats(0, 1e6)
mappings = st.dictionaries(
    texts, st.one_of(st.none(), st.booleans(), st.integers(), st.floats(-9, 9), texts), max_size=3
)
SETTINGS = {
    "student": words,
    "dataset": words,
    "dataset_config": words,
    "license": words,
    "class_names": st.lists(words.filter(str.strip), min_size=1, max_size=4, unique_by=str.strip),
    "student_args": mappings,
    "teacher_args": mappings,
    "student_pretrained": st.booleans(),
    "streaming": st.booleans(),
    "image_column": words,
    "label_column": words,
    "student_taps": st.lists(texts.filter(lambda text: text[0] != "-"), min_size=2, max_size=2, unique=True),
    "learning_rate": rates,
    "weight_decay": shares,
    "spatial_weight": rates,
    "temperature": st.floats(1e-9, 1e9),
    "logit_weight": shares,
    "crop_scale": st.sampled_from(([0.08, 1.0], [1e-5, 0.5], [1, 1])),
    "pixel_range": st.tuples(st.floats(-1e9, -1e-9), st.floats(0, 1e9)).map(list),
    "hflip": shares,
    "antialias": st.booleans(),
    "remove_direct_component": st.booleans(),
    "seed": st.integers(0, 2**31),
    "data_seed": st.integers(0, 2**31),
    "ema_decay": shares,
    "max_bad_images": shares,
    "repeated_augmentation": st.integers(1, 9),
    "max_grad_norm": rates,
    "report_to": st.sampled_from(("none", "tensorboard")),
    "save_strategy": st.sampled_from(("no", "steps", "epoch")),
    "run_name": words,
}


@examples(12)
@given(st.fixed_dictionaries({}, optional=SETTINGS))
@example({"report_to": "none", "image_column": "-x", "pixel_range": [-1e-7, 1]})
def test_what_is_written_is_read_as_it_was(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("run")
    base = {"student": "a", "teacher": "b", "dataset": "c", "output_dir": str(folder), "use_cpu": True}
    files = [folder / f"{name}.yaml" for name in ("asked", "resolved", "training_config")]
    files[0].write_text(yaml.safe_dump(base | changes))
    arguments, config = parse_config(DistillArguments, [str(files[0])])
    for name, value in changes.items():
        asked = {"none": []}.get(value, [value]) if name == "report_to" else value
        assert getattr(arguments, name, getattr(config, name, None)) == asked
    write_config(arguments, config, files[1])
    told = given_arguments(arguments) | changed(rebuilding_settings(config), type(config))
    files[2].write_text(yaml.safe_dump(told | {"teacher": "b"}))
    (one, first), (two, second) = (parse_config(DistillArguments, [str(file), "--use_cpu"]) for file in files[1:])
    assert one == two == arguments and resolved(one, first) == resolved(arguments, config)
    assert rebuilding_settings(second) == rebuilding_settings(config)
    wanted = {field.name for field in dataclasses.fields(ScaleKDConfig)} & set(changes) - {"report_to", "run_name"}
    assert all(getattr(second, name) == getattr(config, name) for name in wanted)
