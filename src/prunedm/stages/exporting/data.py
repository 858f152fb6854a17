"""What quantisation reads: problems to calibrate on, others to measure on, and the features."""

from dataclasses import dataclass

from prunedm.data import ImageSet
from prunedm.evaluation.features import FeatureNetwork
from prunedm.evaluation.loss import fixed_batches
from prunedm.folder import Model
from prunedm.options import EvaluateOptions, ExportOptions
from prunedm.record import Source
from prunedm.sampling import make_sampler, set_steps
from prunedm.stages.evaluating.quality import with_features
from prunedm.stages.inputs import data_source, held_out_problems, images_for, training_problems
from prunedm.task import Batch


@dataclass(frozen=True)
class Data:
    """Opened before any work, so that what is missing is told at once."""

    calibration: list[Batch]  # of training images, antithetic over all timesteps
    held_out: list[Batch]
    reference: ImageSet  # images behind the distances
    evaluate: EvaluateOptions
    network: FeatureNetwork | None
    sources: dict[str, Source]

    @classmethod
    def of(cls, model: Model, options: ExportOptions) -> "Data":
        images = images_for(model, options, "train")
        reference = images_for(model, options, "test")
        shared = EvaluateOptions.model_fields.keys() & ExportOptions.model_fields.keys()
        asked = EvaluateOptions(**{name: getattr(options, name) for name in shared})
        evaluate, network, files = with_features(asked, reference)
        if evaluate.samples:
            set_steps(make_sampler(model.scheduler, evaluate.sampler), evaluate.sampling_steps)
        problems = training_problems(model, options, images)
        return cls(
            calibration=fixed_batches(problems, options.calibration_problems),
            held_out=held_out_problems(model, options, options.problems),
            reference=reference,
            evaluate=evaluate,
            network=network,
            sources={"dataset": data_source(reference)} | files,
        )
