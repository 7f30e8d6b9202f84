//! Which snapshots make way for others: a pure choice, without files or clocks.
//!
//! ```text
//! worth = (hits + freshness) · tokens / bytes · factor of its kind
//! ```
//! Hits and freshness (1 when it was saved) halve every six hours, so nothing lives for having been good once, and what nobody asked for
//! ages as well. A snapshot that a longer one of the same conversation supersedes goes before all others; one that is pinned never goes.

use super::{Kind, SnapshotId};

/// In which time hits and freshness halve.
const HALF_LIFE_S: f64 = 6.0 * 3600.0;

/// What is known of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    /// Digest of what it is bound to.
    pub binding: [u8; 32],
    /// Why it was saved.
    pub kind: Kind,
    /// Tokens of its session.
    pub tokens: u64,
    /// Bytes of its file.
    pub bytes: u64,
    /// When it was saved, in seconds since 1970.
    pub saved_s: u64,
    /// When it was used last.
    pub used_s: u64,
    /// How often it was used, as that counted when it was used last.
    pub hits: f64,
    /// A longer one that begins with it.
    pub superseded_by: Option<SnapshotId>,
}

impl Entry {
    /// Counts a use.
    pub fn hit(&mut self, now_s: u64) {
        self.hits = self.hits * halved(self.used_s, now_s) + 1.0;
        self.used_s = now_s;
    }

    /// What a byte of it is worth.
    pub fn worth(&self, now_s: u64) -> f64 {
        let factor = match self.kind {
            Kind::Common => 4.0,
            Kind::Idle | Kind::Evicted | Kind::Shutdown => 2.0,
            Kind::Interval => 1.0,
        };
        let wanted = self.hits * halved(self.used_s, now_s) + halved(self.saved_s, now_s);
        wanted * self.tokens as f64 / self.bytes as f64 * factor
    }
}

fn halved(since_s: u64, now_s: u64) -> f64 {
    libm::exp2(-(now_s.saturating_sub(since_s) as f64) / HALF_LIFE_S)
}

/// Which of `candidates` go so that `needed_bytes` more have room, the first one first; each with whether it is superseded. `None` if all of
/// them are too few.
pub fn victims<'e>(
    candidates: impl Iterator<Item = (SnapshotId, &'e Entry, bool)>,
    needed_bytes: u64,
    now_s: u64,
) -> Option<Vec<SnapshotId>> {
    let mut order: Vec<_> = candidates
        .map(|(id, entry, superseded)| (!superseded, entry.worth(now_s), entry.used_s, id, entry.bytes))
        .collect();
    order.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.cmp(&b.2)).then(a.3.cmp(&b.3)));
    let (mut victims, mut freed) = (Vec::new(), 0);
    for (_, _, _, id, bytes) in order {
        if freed >= needed_bytes {
            break;
        }
        victims.push(id);
        freed += bytes;
    }
    (freed >= needed_bytes).then_some(victims)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn fresh(kind: Kind) -> Entry {
        let (saved_s, used_s) = (NOW, NOW);
        Entry { binding: [0; 32], kind, tokens: 100, bytes: 1000, saved_s, used_s, hits: 0.0, superseded_by: None }
    }

    #[test]
    fn kinds_ages_and_hits_have_the_worth_they_should() {
        let worth = |entry: Entry| entry.worth(NOW);
        assert_eq!(worth(fresh(Kind::Common)), 0.4);
        assert_eq!(worth(fresh(Kind::Idle)), 0.2);
        assert_eq!(worth(fresh(Kind::Interval)), 0.1);
        assert_eq!(worth(Entry { saved_s: NOW - 6 * 3600, ..fresh(Kind::Idle) }), 0.1);
        let mut used = Entry { used_s: NOW - 6 * 3600, hits: 2.0, ..fresh(Kind::Idle) };
        assert_eq!(worth(used), 0.4);
        used.hit(NOW);
        assert_eq!((used.hits, worth(used)), (2.0, 0.6));
        assert_eq!(worth(Entry { saved_s: NOW + 9, ..fresh(Kind::Idle) }), 0.2, "clocks are put back");
    }

    fn entries() -> impl Strategy<Value = Vec<(Entry, bool)>> {
        let kind = prop::sample::select(vec![Kind::Common, Kind::Idle, Kind::Evicted, Kind::Shutdown, Kind::Interval]);
        let parts = (kind, 1u64..5, 1u64..5, 0u64..3, 0u64..3, 0u32..3, any::<bool>());
        let entry = parts.prop_map(|(kind, tokens, bytes, saved, used, hits, superseded)| {
            let (saved_s, used_s) = (NOW - saved * 9000, NOW - used * 9000);
            (Entry { tokens, bytes, saved_s, used_s, hits: hits.into(), ..fresh(kind) }, superseded)
        });
        prop::collection::vec(entry, 0..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whoever goes is worth no more than who stays, no more go than must, and all of them only if that is enough.
        #[test]
        fn the_least_worth_go_first(entries in entries(), needed in 0u64..40) {
            let id = |i: usize| SnapshotId([i as u8; 32]);
            let chosen = victims(entries.iter().enumerate().map(|(i, (e, s))| (id(i), e, *s)), needed, NOW);
            let total: u64 = entries.iter().map(|(entry, _)| entry.bytes).sum();
            prop_assert_eq!(chosen.is_some(), total >= needed);
            let chosen = chosen.unwrap_or_default();
            let bytes = |ids: &[SnapshotId]| ids.iter().map(|id| entries[id.0[0] as usize].0.bytes).sum::<u64>();
            prop_assert!(total < needed || bytes(&chosen) >= needed);
            prop_assert!(chosen.is_empty() || bytes(&chosen[..chosen.len() - 1]) < needed);
            let rank = |id: &SnapshotId| {
                let (entry, superseded) = &entries[id.0[0] as usize];
                (!superseded, entry.worth(NOW))
            };
            for (i, _) in entries.iter().enumerate().filter(|(i, _)| !chosen.contains(&id(*i))) {
                prop_assert!(chosen.iter().all(|gone| rank(gone) <= rank(&id(i))));
            }
        }
    }
}
