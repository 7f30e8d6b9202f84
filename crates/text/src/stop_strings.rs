//! Stop strings: texts that end a turn where one of them first occurs, however the turn's text is cut.

/// Watches a text for stop strings and hands it out up to the first.
///
/// The first is the one that is complete first, as the model need not write more; of several that end at the same place, the longest.
/// Text is kept back only while it is the beginning of a stop string.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The end of the text so far that may become a stop string.
    held: String,
    /// The place of the stop string that occurred.
    matched: Option<usize>,
}

impl StopStrings {
    /// Watches for `stops`; empty ones are left out, since they would end every turn before it begins.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, held: String::new(), matched: None }
    }

    /// Takes the next text. Returns the text that is now known to stand before any stop string, and whether one has occurred:
    /// then all that follows is dropped.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        if self.matched.is_some() {
            return (String::new(), true);
        }
        self.held.push_str(text);
        let ends = |(place, stop): (usize, &String)| self.held.find(stop).map(|at| (at + stop.len(), at, place));
        if let Some((_, at, place)) = self.stops.iter().enumerate().filter_map(ends).min() {
            self.matched = Some(place);
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let kept = self.held.split_off(self.held.len() - self.beginning_bytes());
        (std::mem::replace(&mut self.held, kept), false)
    }

    /// Ends the text: returns what was kept back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The stop string that occurred.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|place| self.stops[place].as_str())
    }

    /// How many bytes at the end of the held text are the beginning of a stop string.
    fn beginning_bytes(&self) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let is_beginning = |at: &usize| {
            let tail = &self.held.as_bytes()[*at..];
            self.stops.iter().any(|stop| stop.as_bytes().starts_with(tail))
        };
        (from..self.held.len()).find(is_beginning).map_or(0, |at| self.held.len() - at)
    }
}
