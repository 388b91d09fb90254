"""Every error that reaches a user. The tree:

SfLocalError
├── ArtifactError           the compiled model cannot be used
│   ├── MissingFileError    a file of the artifact is not there
│   ├── CorruptFileError    a file is truncated, malformed, or its hash differs
│   ├── VersionError        made by another compiler or format version
│   ├── TargetError         made for another device or CPU
│   └── MismatchError       files of the artifact disagree with each other
├── DeviceError             the device is unknown, absent or failed, or a GPU's result is wrong
├── RequestError            a request that cannot be served as asked (also a ValueError)
│   ├── GrammarError        a grammar that cannot be compiled
│   ├── PromptTooLongError  a prompt for which the context has no room
│   ├── ImageError          an image that cannot be opened, or that the model cannot read
│   └── ChatTemplateError   the model's chat template cannot be used, or refuses a conversation
├── EngineError             the engine is closed or failed, or a CPU's result is wrong
└── CompileError            a model that cannot be compiled
    ├── SourceError         the weights are missing, corrupt, or unreachable
    ├── UnsupportedError    a model, tokenizer, chip, or option that is not supported
    └── OutputError         the output folder cannot be written
"""


class SfLocalError(Exception):
    """Base class of all errors that sf_local and compile raise."""


class ArtifactError(SfLocalError):
    """The compiled model cannot be used."""


class MissingFileError(ArtifactError):
    """A file of the artifact is not there."""


class CorruptFileError(ArtifactError):
    """A file of the artifact is truncated, malformed, or its hash differs."""


class VersionError(ArtifactError):
    """The artifact was made by another compiler or format version."""


class TargetError(ArtifactError):
    """The artifact was made for another device or CPU."""


class MismatchError(ArtifactError):
    """Files of one artifact disagree with each other."""


class DeviceError(SfLocalError):
    """The device is unknown, absent, or failed; or a GPU returned NaN, or no token."""


class RequestError(SfLocalError, ValueError):
    """A request that cannot be served as asked."""


class GrammarError(RequestError):
    """A grammar that cannot be compiled."""


class PromptTooLongError(RequestError):
    """A prompt for which the context has no room, with an answer."""


class ImageError(RequestError):
    """An image that cannot be opened, or that the model cannot read."""


class ChatTemplateError(RequestError):
    """The model's chat template is missing, cannot be used, or refuses a conversation."""


class EngineError(SfLocalError):
    """The engine is closed or failed; or a CPU returned NaN, or no token."""


class CompileError(SfLocalError):
    """A model that cannot be compiled."""


class SourceError(CompileError):
    """The weights are missing, corrupt, or unreachable."""


class UnsupportedError(CompileError):
    """A model, tokenizer, chip, or option that is not supported."""


class OutputError(CompileError):
    """The output folder cannot be written."""
