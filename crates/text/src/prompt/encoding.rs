//! The prompt format of a checkpoint, and how the model is asked to reason.

use std::fmt;
use std::str::FromStr;

/// The prompt format of a checkpoint. The two differ in the effort prefix alone (§3.7), and no key of a
/// model file tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// The weights of April 2026.
    V4_2604,
    /// The weights of 31 July 2026.
    V4_0731,
}

impl Encoding {
    /// Guesses from a model's file name: it holds `0731`, or the weights are those of April.
    pub fn guess(file_name: &str) -> Self {
        if file_name.contains("0731") { Self::V4_0731 } else { Self::V4_2604 }
    }

    /// The text after BOS that asks for `effort` (§3.7); `None` if these weights do not know the level.
    pub(super) fn effort_prefix(self, effort: Effort) -> Option<&'static str> {
        match (self, effort) {
            (Self::V4_2604, Effort::Low) => None,
            (Self::V4_2604, Effort::High) | (Self::V4_0731, Effort::Low) => Some(""),
            (Self::V4_2604, Effort::Max) | (Self::V4_0731, Effort::High) => Some(ABSOLUTE_MAXIMUM),
            (Self::V4_0731, Effort::Max) => Some(BEYOND_MAXIMUM),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4_2604 => "v4-2604",
            Self::V4_0731 => "v4-0731",
        })
    }
}

/// A name that is no [`Encoding`].
#[derive(Debug, thiserror::Error)]
#[error(
    "the encoding is `{found}`, expected `v4-2604` (the weights of April 2026) or `v4-0731` (those of 31 July 2026)"
)]
pub struct UnknownEncoding {
    /// The name.
    found: String,
}

impl FromStr for Encoding {
    type Err = UnknownEncoding;

    fn from_str(name: &str) -> Result<Self, UnknownEncoding> {
        [Self::V4_2604, Self::V4_0731]
            .into_iter()
            .find(|encoding| encoding.to_string() == name)
            .ok_or_else(|| UnknownEncoding { found: name.to_owned() })
    }
}

/// How long the model is asked to reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Only for [`Encoding::V4_0731`], where it is the same as no level.
    Low,
    /// Long.
    High,
    /// As long as it takes.
    Max,
}

impl fmt::Display for Effort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Low => "low",
            Self::High => "high",
            Self::Max => "max",
        })
    }
}

/// Whether the next turn reasons before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Answers at once.
    Chat,
    /// Reasons first.
    Thinking {
        /// How long; `None` adds nothing to the prompt.
        effort: Option<Effort>,
    },
}

impl Default for Mode {
    /// What the hosted API does when a request says nothing (§3.9).
    fn default() -> Self {
        Self::Thinking { effort: Some(Effort::High) }
    }
}

/// A name that is no effort level of the API.
#[derive(Debug, thiserror::Error)]
#[error(
    "the effort is `{found}`, expected `none` (answer at once), `minimal`, `low`, `medium`, `high`, `xhigh` or `max`"
)]
pub struct UnknownEffortName {
    /// The name.
    found: String,
}

impl Mode {
    /// The mode that an effort level of the API stands for with the weights of `encoding` (§3.9).
    ///
    /// # Errors
    /// [`UnknownEffortName`] for every other name.
    pub fn from_effort_name(name: &str, encoding: Encoding) -> Result<Self, UnknownEffortName> {
        let effort = match (name, encoding) {
            ("none", _) => return Ok(Self::Chat),
            // These weights know no level below `high`, which adds nothing to the prompt.
            ("minimal" | "low", Encoding::V4_2604) => Effort::High,
            ("minimal" | "low", Encoding::V4_0731) => Effort::Low,
            ("medium" | "high" | "xhigh", _) => Effort::High,
            ("max", _) => Effort::Max,
            _ => return Err(UnknownEffortName { found: name.to_owned() }),
        };
        Ok(Self::Thinking { effort: Some(effort) })
    }
}

/// Text A of §3.7.
const ABSOLUTE_MAXIMUM: &str = "\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

";

/// Text B of §3.7.
const BEYOND_MAXIMUM: &str = "\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption remains unchecked and no error remains undiscovered.

";
