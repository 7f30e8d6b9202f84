//! Fixed texts of the prompt (docs/spec/conversation.md §3.5, §3.6).

/// Before the tool schemas, one on a line.
pub(super) const TOOLS_HEAD: &str = "\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \"<｜DSML｜tool_calls>\" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name=\"$TOOL_NAME\">
<｜DSML｜parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name=\"$TOOL_NAME2\">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string=\"true\"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string=\"false\"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

";

/// After the tool schemas. It ends with a newline.
pub(super) const TOOLS_TAIL: &str = "

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
";

/// Before the schema of the answer.
pub(super) const RESPONSE_FORMAT: &str =
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";

/// Before the output of a tool.
pub(super) const RESULT_OPENER: &str = "<tool_result>";
/// After the output of a tool.
pub(super) const RESULT_CLOSER: &str = "</tool_result>";
/// How [`RESULT_CLOSER`] is spelt inside the output of a tool.
pub(super) const ESCAPED_RESULT_CLOSER: &str = "&lt;/tool_result>";

/// The control token before a reminder.
pub(super) const REMINDER: &str = "<｜latest_reminder｜>";
