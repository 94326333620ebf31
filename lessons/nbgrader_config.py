"""nbgrader's settings for the exercises: read by build.py, and copied into the course folder that it makes."""

c = get_config()  # noqa: F821  (nbgrader puts it there)
c.CourseDirectory.course_id = "minilora"
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError"}
c.ExecutePreprocessor.timeout = 300  # seconds for a cell
