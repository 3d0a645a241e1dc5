"""Hugging Face registration: after it, AutoConfig, AutoModel and AutoProcessor load acllm and speech_encoder artifacts.

`import seedling` must not cost the seconds that torch and transformers take, yet `AutoModel.from_pretrained(artifact)`
must work whichever is imported first. So `register_lazily()` registers at once where transformers' Auto modules are
loaded, and otherwise waits for them: a finder on `sys.meta_path` that finds nothing itself, and runs the registration
when one of the named modules has just been executed. It removes itself when all are through.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType


def register_config() -> None:
    """Make AutoConfig read our config.json files."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from .audio_llm_config import AudioLLMConfig
    from .speech_encoder_config import SpeechEncoderConfig

    for config in (AudioLLMConfig, SpeechEncoderConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def register_model() -> None:
    """Make AutoModel build our models."""
    from transformers.models.auto.modeling_auto import AutoModel

    from .audio_llm import AudioLLM
    from .speech_encoder import SpeechEncoder

    for model in (AudioLLM, SpeechEncoder):
        AutoModel.register(model.config_class, model, exist_ok=True)


def register_processor() -> None:
    """Make AutoProcessor build our processor."""
    from transformers.models.auto.processing_auto import AutoProcessor

    from .audio_llm_config import AudioLLMConfig
    from .processor import AudioLLMProcessor

    AutoProcessor.register(AudioLLMConfig, AudioLLMProcessor, exist_ok=True)


REGISTRATIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_config,
    "transformers.models.auto.modeling_auto": register_model,
    "transformers.models.auto.processing_auto": register_processor,
}


def register() -> None:
    """Register now; imports torch and transformers. Doing it again changes nothing."""
    for registration in REGISTRATIONS.values():
        registration()


def register_lazily(others: Mapping[str, Callable[[], None]]) -> None:
    """Register each class when the Auto module that takes it is, or has been, imported.

    `others` are registrations of other folders by the module that they wait for, as REGISTRATIONS are.
    """
    waiting = {}
    for name, registration in {**REGISTRATIONS, **others}.items():
        if name in sys.modules:
            registration()
        else:
            waiting[name] = registration
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function after the import of a module, which every other finder finds as ever."""

    def __init__(self, waiting: dict[str, Callable[[], None]]):
        self.waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        after = self.waiting.pop(name, None)
        if after is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, after)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, after: Callable[[], None]):
        self.loader = loader
        self.after = after

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module is handed back as if this class had never been: nothing else should see the detour.
        assert module.__spec__ is not None, "a module that is being imported has one"
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.after()
