"""Batch scripts: the templates of ``slurm/``, with their blocks filled in.

A template is a batch script that runs as it is. The lines that begin with ``#%`` are Jinja's, and
comments to bash: what stands between ``#% block NAME`` and ``#% endblock`` is replaced.
"""

from __future__ import annotations

from pathlib import Path

from hpctrain.errors import Error

HERE = Path(__file__).parent / "templates"


def render(template: str, blocks: dict[str, str]) -> str:
    """Render a template with some of its blocks replaced.

    Args:
        template: The template's name; ``.sbatch`` may be left out.
        blocks: The new text of blocks, by their names.

    Returns:
        The batch script.

    Raises:
        Error: The template has no such block.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        line_statement_prefix="#%",
        # What bash never has: its ${#array} would begin one of Jinja's comments.
        block_start_string="@{%",
        block_end_string="%}@",
        variable_start_string="@{{",
        variable_end_string="}}@",
        comment_start_string="@{#",
        comment_end_string="#}@",
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - a shell script, quoted by whoever fills it in
    )
    file = template if "." in template else f"{template}.sbatch"
    base = environment.get_template(file)
    if unknown := set(blocks) - set(base.blocks):
        raise Error(f"{file} has no place for {', '.join(sorted(unknown))}.")
    lines = [f"#% extends '{file}'"]
    for name in blocks:
        lines += [f"#% block {name}", f"@{{{{ {name} }}}}@", "#% endblock"]
    return environment.from_string("\n".join(lines)).render(blocks)
