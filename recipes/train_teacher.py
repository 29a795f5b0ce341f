"""Fine-tune any image classifier on your own data, so that it can teach: it then knows your labels.

accelerate launch recipes/train_teacher.py recipes/configs/quickstart_teacher.yaml [--any_field value ...]
"""

from pathlib import Path

from transformers import set_seed

from scalekd_hf import ScaleKDTrainer, load_student
from scalekd_hf.data.dataset import dataset_labels
from scalekd_hf.models.saving import check_output_dir, interrupted, load_student_weights, run_settings
from scalekd_hf.tools.recipe import TeacherArguments, load_data, parse_config, train_and_save, write_config


def main() -> None:
    arguments, config = parse_config(TeacherArguments)
    if interrupted(config.output_dir, run_settings(config)):
        print(f"The run in {config.output_dir} was stopped before its end: it is resumed.")
        config.resume_from_checkpoint = True
    if not config.resume_from_checkpoint:
        check_output_dir(config.output_dir, config.overwrite_output_dir)
    train, evaluation = load_data(arguments)
    set_seed(config.seed)
    model = load_student(
        arguments.model,
        pretrained=arguments.pretrained,
        labels=dataset_labels(train, config.label_column),
        image_size=config.image_size,
        **arguments.model_args,
    )
    trainer = ScaleKDTrainer(model, None, config, train, evaluation)
    if config.process_index == 0:
        write_config(arguments, config, f"{config.output_dir}/config_resolved.yaml")
    train_and_save(trainer)
    if evaluation is not None:
        if not trainer.state.global_step:  # an earlier call has trained it
            load_student_weights(trainer.student, Path(config.output_dir))
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.is_world_process_zero():
            print(f"top-1 {metrics['eval_top1']:.2%}, saved in {config.output_dir}")


if __name__ == "__main__":
    main()
