"""Fine-tune an image classifier, so that it can teach: it then knows the data's labels."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import set_seed

from ..data.dataset import shown_labels
from ..data.loading import load_data
from ..models.saving import load_student_weights
from ..models.students import load_student
from ..tools.recipe import TeacherArguments, given_arguments, mapping, parse_config
from ..training.trainer import ScaleKDTrainer
from .distill import evaluated_of, source_of
from .runs import resume_or_refuse, train_and_save


__all__ = ["main"]


def main(words: Sequence[str] | None = None) -> None:
    """Train the classifier that the words name; those of this process by default."""
    arguments, config = parse_config(TeacherArguments, words)
    resume_or_refuse(config)
    train, evaluation = load_data(arguments, config.output_dir if config.process_index == 0 else None)
    set_seed(config.seed)
    labels = shown_labels(train, config.label_column, arguments.num_classes, arguments.class_names)
    if labels is None:
        raise ValueError(
            "The training data name no classes, and a model keeps none of another task: set `num_classes` to their number, or "
            "`class_names` to their names, in the order of the labels."
        )
    model = load_student(
        arguments.model,
        pretrained=arguments.pretrained,
        labels=labels,
        image_size=config.image_size,
        **mapping(arguments.model_args, "model_args"),
    )
    trainer = ScaleKDTrainer(model, None, config, train, evaluation)
    trainer.publisher.arguments = given_arguments(arguments)
    trainer.data, trainer.evaluated = trainer.data or source_of(arguments), evaluated_of(arguments, trainer.evaluated)
    train_and_save(trainer, arguments, config)
    if evaluation is not None:
        if not trainer.state.global_step:  # an earlier call has trained it
            load_student_weights(trainer.student, str(config.output_dir))
            if trainer.averaged is not None:
                trainer.averaged.restart(config.device)  # it is what is evaluated
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.is_world_process_zero():
            print(f"top-1 {metrics['eval_top1']:.2%}, saved in {config.output_dir}")
