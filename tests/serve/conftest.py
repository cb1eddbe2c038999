"""A server of tiny models, which most tests share."""

import httpx
import pytest

from stars_kernels import Engine
from stars_kernels.serve import running
from tests.tiny import byte_tokenizer, tiny_language_model, tiny_reward_model

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SET = dict(reward_threshold=3.0, beta=1.0, max_new_tokens=12, segment_size=4, max_attempts=3, progress=False)


@pytest.fixture(scope="package")
def tokenizer():
    return byte_tokenizer(TEMPLATE)


@pytest.fixture(scope="package")
def engine(tokenizer):
    models = tiny_language_model(), tiny_reward_model()
    with Engine(*models, tokenizer=tokenizer, batch_size=4, **SET) as engine:
        yield engine


@pytest.fixture(scope="package")
def url(engine):
    with running(engine, model_name="tiny") as url:
        yield url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
