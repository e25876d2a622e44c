"""The parts of `UniDiffPipeline`: settings, inputs, rows, results and folders."""
