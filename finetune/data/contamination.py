"""Find overlap between training and eval examples: images by content, questions about equal images by their words."""

from dataclasses import dataclass

import numpy as np

from finetune.data.prepared import Prepared


@dataclass(frozen=True)
class Contamination:
    """Images and questions found in both training and eval data, and the training examples that hold them."""

    images: int
    """Number of distinct images in both."""
    questions: int
    """Number of distinct questions in both, about the same images (or about none)."""
    examples_with_images: np.ndarray
    """Indices of training examples that show an eval image: int64, sorted."""
    examples_with_questions: np.ndarray
    """Indices of training examples that ask an eval question: int64, sorted."""

    def to_json(self) -> dict[str, int]:
        return {
            "images": self.images,
            "questions": self.questions,
            "training_examples_with_images": len(self.examples_with_images),
            "training_examples_with_questions": len(self.examples_with_questions),
        }


def find_contamination(training: Prepared, eval_set: Prepared) -> Contamination:
    (shown, images), (_, eval_images) = training.shown_images(), eval_set.shown_images()
    (asked, questions), (_, eval_questions) = training.asked_questions(), eval_set.asked_questions()
    same_images, same_questions = np.isin(images, eval_images), np.isin(questions, eval_questions)
    return Contamination(
        images=len(np.unique(images[same_images])),
        questions=len(np.unique(questions[same_questions])),
        examples_with_images=np.unique(shown[same_images]),
        examples_with_questions=np.unique(asked[same_questions]),
    )
