"""For tests of models that adopt sparse attention: inputs, and assertions that say what is wrong and by how much.

    attention_inputs()         a hypothesis strategy: attention calls as models make them, and as kernels get them wrong
    AttentionInputs            one such call; its repr makes it again
    assert_close_to_dense()    an attention function, or a whole model, against its dense counterpart
    assert_rewritten()         exactly so many attention calls of a model run sparsely

`import sparge_compile` does not import this module. Only `attention_inputs` needs hypothesis
(`pip install 'sparge-compile[testing]'`). docs/testing.md has examples.
"""

from sparge_compile.testing.closeness import assert_close_to_dense
from sparge_compile.testing.inputs import LAYOUTS, MASKS, NON_FINITE, VALUES, AttentionInputs
from sparge_compile.testing.rewritten import assert_rewritten
from sparge_compile.testing.strategy import attention_inputs

__all__ = [
    "LAYOUTS",
    "MASKS",
    "NON_FINITE",
    "VALUES",
    "AttentionInputs",
    "assert_close_to_dense",
    "assert_rewritten",
    "attention_inputs",
]
