"""hfgen: train, compare and ship small unconditional image generators.

`import hfgen` imports nothing heavy. The public API is in its modules: `hfgen.pipelines`, `hfgen.models`,
`hfgen.losses`, `hfgen.data`.
"""

__version__ = "0.1.0.dev0"
