"""nbgrader's settings for the exercises: read by build.py, and copied into the course folder that it makes."""

from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, DeduplicateIds, OverwriteCells, OverwriteKernelspec


class WithoutCopies(DeduplicateIds):
    """Of a cell that a student has copied, the last counts."""

    def preprocess(self, nb, resources):
        """The notebook without empty metadata, which nbgrader leaves in the other copies and stops at for all."""
        nb, resources = super().preprocess(nb, resources)
        for cell in nb.cells:
            if cell.metadata.get("nbgrader") == {}:
                del cell.metadata["nbgrader"]
        return nb, resources


c = get_config()  # noqa: F821  (nbgrader puts it there)
c.CourseDirectory.course_id = "minilora"
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError"}
c.ExecutePreprocessor.timeout = 300  # seconds for a cell
c.Autograde.sanitize_preprocessors = [
    ClearOutput,
    WithoutCopies,
    OverwriteKernelspec,
    OverwriteCells,
    CheckCellMetadata,
]
