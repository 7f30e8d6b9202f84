{# Whose a row of a pass is, and where it lies in that session (together.rs). A dispatch computes rows of one session, which
   its parameters tell of; or of several, which are bound side by side: then a table has a `Run` for each row.

   states: sessions that are bound: 1, 2, 4 or 8. Kernels have `tables` and the parameters `p`, which begin with those here. -#}

{% macro params() %}
    // The run, as in `Run`; of several sessions, `row0` is where those of the layer begin in the tables, in pairs.
    row0: u32,
    start: u32,
    ring: u32,
    index: u32,
    windows: u32,
{% endmacro %}

{% macro sessions(first, access) %}
{% for s in range(states) %}
@group(0) @binding({{ first + s }}) var<storage, {{ access }}> session{{ s }}: array<u32>;
{% endfor %}
{% endmacro %}

{% macro of_rows() %}
// The rows of one session in the pass.
struct Run {
    // The first of them, and its position.
    row0: u32,
    start: u32,
    // Words of the session: where its ring begins, and the indexer's rows.
    ring: u32,
    index: u32,
    // First of the rotations of the windows that end in the run.
    windows: u32,
    // Which of the sessions that are bound.
    session: u32,
}

// That of a row of the pass.
fn run_of(row: u32) -> Run {
{% if states == 1 %}
    return Run(p.row0, p.start, p.ring, p.index, p.windows, 0u);
{% else %}
    let at = p.row0 + 3u * row;
    return Run(tables[at].x, tables[at].y, tables[at + 1u].x, tables[at + 1u].y, tables[at + 2u].x, tables[at + 2u].y);
{% endif %}
}

fn position_of(run: Run, row: u32) -> u32 {
    return run.start + row - run.row0;
}
{% endmacro %}

{# What is called with the name of a session, for the one of this number; the same for all threads of a workgroup. -#}
{% macro with_session(number) %}
{% if states == 1 %}
{{ caller("session0") }}
{%- else %}
    switch {{ number }} {
{% for s in range(states) %}
        case {{ s }}u{{ ", default" if loop.last }}: {
{{ caller("session" ~ s) }}
        }
{% endfor %}
    }
{% endif %}
{% endmacro %}

{% macro keeper() %}
// Writes a word of a session.
fn keep(session: u32, at: u32, word: u32) {
{% call(memory) with_session("session") %}
    {{ memory }}[at] = word;
{% endcall %}
}
{% endmacro %}
