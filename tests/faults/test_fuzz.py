"""Every reader of files from elsewhere, given damaged ones: it refuses them in one line, or reads them.

Never another exception, a hang, or memory without bound; and files with digests are never read as something else.
"""

import pytest

from tests.faults.fuzzing import READERS, Reader, fuzz


@pytest.mark.parametrize("n_examples", [12, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_files_are_refused_or_read(reader: Reader, n_examples):
    answers = fuzz(reader, n_examples)
    assert answers.total() >= n_examples // 2
