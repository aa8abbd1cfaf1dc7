import warnings

import numpy as np

from clipmini.evaluation.figures import draw_similarities


def test_similarities_of_a_collapsed_model_can_be_drawn():
    ones = np.ones(50, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_similarities(ones, ones - np.float32(1e-7)).startswith("<svg")
