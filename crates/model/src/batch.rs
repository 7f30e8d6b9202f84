//! The rows of one forward pass.
//!
//! A prefill chunk, one decoded token, the check of a draft and the next tokens of eight sessions are the same thing: a
//! list of rows. Rows of one session stand together, in order of position, and continue that session.

use std::ops::Range;

use crate::{Config, Error};

/// One token to be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Index of the session among the states handed to the pass.
    pub session: usize,
    /// Absolute position, counted from 0.
    pub position: usize,
    /// The token at this position.
    pub token: u32,
    /// Whether the logits that follow this token are wanted.
    pub logits: bool,
}

/// The rows of one session in a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The session.
    pub session: usize,
    /// Position of the first row.
    pub start: usize,
    /// Where the rows stand in the batch.
    pub rows: Range<usize>,
}

/// Rows that were checked to make sense together.
#[derive(Clone, Debug)]
pub struct Batch {
    rows: Vec<Row>,
    runs: Vec<Run>,
}

impl Batch {
    /// Checks `rows` against the sessions they continue: `positions[s]` is the number of tokens session `s` has seen.
    ///
    /// # Errors
    /// [`Error::Batch`] if there are no rows, a token is outside the vocabulary, a position is past the model's context,
    /// or the rows of a session are scattered or do not continue it.
    pub fn new(rows: Vec<Row>, positions: &[usize], config: &Config) -> Result<Batch, Error> {
        let mut runs: Vec<Run> = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let wrong = |what: String| Err(Error::Batch { row: i, what });
            if row.token as usize >= config.vocab_size {
                return wrong(format!("token {} is outside the vocabulary of {}", row.token, config.vocab_size));
            }
            if row.position >= config.context_length {
                let (position, limit) = (row.position, config.context_length);
                return wrong(format!("position {position} is past the model's context of {limit} tokens"));
            }
            match runs.last_mut() {
                Some(run) if run.session == row.session => {
                    let expected = run.start + run.rows.len();
                    if row.position != expected {
                        return wrong(format!("position {} follows, expected {expected}", row.position));
                    }
                    run.rows.end = i + 1;
                }
                _ => {
                    if runs.iter().any(|run| run.session == row.session) {
                        return wrong(format!("rows of session {} do not stand together", row.session));
                    }
                    let Some(&seen) = positions.get(row.session) else {
                        return wrong(format!("session {} of {}", row.session, positions.len()));
                    };
                    if row.position != seen {
                        return wrong(format!("position {}, but its session has seen {seen} tokens", row.position));
                    }
                    runs.push(Run { session: row.session, start: row.position, rows: i..i + 1 });
                }
            }
        }
        if rows.is_empty() {
            return Err(Error::Batch { row: 0, what: "a pass needs at least one row".into() });
        }
        Ok(Batch { rows, runs })
    }

    /// All rows, in order.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The rows, session by session.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Indices of the rows whose logits are wanted.
    pub fn wanted(&self) -> impl Iterator<Item = usize> + '_ {
        self.rows.iter().enumerate().filter(|(_, row)| row.logits).map(|(i, _)| i)
    }
}
