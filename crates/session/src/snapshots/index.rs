//! Which snapshots there are: in memory, and as a table of the database.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use redb::{ReadableTable, TableDefinition, TableError};

use super::policy::{Entry, victims};
use super::{Kind, SnapshotId};
use crate::database::{Database, DatabaseError};

/// Id to an [`Entry`]: binding, superseding id (zeros: none), kind, tokens, bytes, when saved, when used, hits.
type Row = (&'static [u8; 32], &'static [u8; 32], u8, u64, u64, u64, u64, f64);
const TABLE: TableDefinition<&'static [u8; 32], Row> = TableDefinition::new("snapshots");

/// The snapshots of a folder.
#[derive(Default)]
pub struct Index {
    entries: HashMap<SnapshotId, Entry>,
    /// How many snapshots of our binding have so many tokens.
    lengths: BTreeMap<u64, usize>,
    ours: [u8; 32],
    /// Damaged files and their bytes: the first to go.
    aside: Vec<(PathBuf, u64)>,
    /// Bytes of all snapshots and damaged files, and of one being written.
    bytes: u64,
    /// Snapshots that must stay, and for how many.
    pins: HashMap<SnapshotId, usize>,
    /// Entries that the table does not have as they are.
    changed: HashSet<SnapshotId>,
}

/// What goes to make room.
#[derive(Debug, Default)]
pub struct Victims {
    pub snapshots: Vec<SnapshotId>,
    pub aside: Vec<PathBuf>,
}

impl Index {
    /// The table of `database`, for who looks for snapshots bound to `ours`.
    pub fn read(database: &Database, ours: [u8; 32]) -> Result<Index, DatabaseError> {
        let rows = database.read(|transaction| {
            let table = match transaction.open_table(TABLE) {
                Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                table => table?,
            };
            let row = |row: Result<(redb::AccessGuard<'_, &'static [u8; 32]>, redb::AccessGuard<'_, Row>), _>| {
                let (id, row) = row?;
                Ok(entry(row.value()).map(|entry| (SnapshotId(*id.value()), entry)))
            };
            table.iter()?.filter_map(|found| row(found).transpose()).collect::<Result<Vec<_>, redb::Error>>()
        })?;
        let mut index = Index { ours, ..Index::default() };
        rows.into_iter().for_each(|(id, entry)| index.insert(id, entry));
        index.changed.clear();
        Ok(index)
    }

    /// Writes what changed to the table of `database`.
    pub fn write(changes: &[(SnapshotId, Option<Entry>)], database: &Database) -> Result<(), DatabaseError> {
        database.write(|transaction| {
            let mut table = transaction.open_table(TABLE)?;
            for (id, entry) in changes {
                match entry {
                    Some(entry) => {
                        let by = entry.superseded_by.map_or([0; 32], |id| id.0);
                        let Entry { binding, kind, tokens, bytes, saved_s, used_s, hits, .. } = entry;
                        let row = (binding, &by, kind.number(), *tokens, *bytes, *saved_s, *used_s, *hits);
                        table.insert(&id.0, row)?;
                    }
                    None => drop(table.remove(&id.0)?),
                }
            }
            Ok(())
        })
    }

    /// What changed since the last time.
    pub fn take_changes(&mut self) -> Vec<(SnapshotId, Option<Entry>)> {
        std::mem::take(&mut self.changed).into_iter().map(|id| (id, self.entries.get(&id).copied())).collect()
    }

    /// Changes that were taken and could not be written.
    pub fn give_back(&mut self, changes: Vec<(SnapshotId, Option<Entry>)>) {
        self.changed.extend(changes.into_iter().map(|(id, _)| id));
    }

    pub fn insert(&mut self, id: SnapshotId, entry: Entry) {
        self.remove(id);
        self.bytes += entry.bytes;
        if entry.binding == self.ours {
            *self.lengths.entry(entry.tokens).or_default() += 1;
        }
        self.entries.insert(id, entry);
        self.changed.insert(id);
    }

    pub fn remove(&mut self, id: SnapshotId) {
        let Some(entry) = self.entries.remove(&id) else { return };
        self.bytes -= entry.bytes;
        self.changed.insert(id);
        if entry.binding != self.ours {
            return;
        }
        let count = self.lengths.get_mut(&entry.tokens).expect("it was counted");
        *count -= 1;
        if *count == 0 {
            self.lengths.remove(&entry.tokens);
        }
    }

    pub fn get(&self, id: SnapshotId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// The entry, which will be written again.
    pub fn change(&mut self, id: SnapshotId) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&id)?;
        self.changed.insert(id);
        Some(entry)
    }

    pub fn ids(&self) -> Vec<SnapshotId> {
        self.entries.keys().copied().collect()
    }

    /// In how many tokens there are snapshots of our binding, ascending, up to `most`.
    pub fn lengths(&self, most: u64) -> Vec<u64> {
        self.lengths.range(..=most).map(|(&tokens, _)| tokens).collect()
    }

    pub fn add_aside(&mut self, path: PathBuf, bytes: u64) {
        if let Some(replaced) = self.aside.iter().position(|(known, _)| *known == path) {
            self.bytes -= self.aside.remove(replaced).1;
        }
        self.bytes += bytes;
        self.aside.push((path, bytes));
    }

    /// Bytes of all that counts.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Sets bytes of a file aside that is being written.
    pub fn reserve(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// The file is written, or not any more.
    pub fn unreserve(&mut self, bytes: u64) {
        self.bytes -= bytes;
    }

    pub fn pin(&mut self, id: SnapshotId) {
        *self.pins.entry(id).or_default() += 1;
    }

    pub fn unpin(&mut self, id: SnapshotId) {
        let count = self.pins.get_mut(&id).expect("it was pinned");
        *count -= 1;
        if *count == 0 {
            self.pins.remove(&id);
        }
    }

    /// Forgets as much as must go so that `incoming` bytes have room within `limit`; the files are still there. `None`, and nothing is
    /// forgotten, if what is pinned leaves too little.
    pub fn make_room(&mut self, incoming: u64, limit: u64, now_s: u64) -> Option<Victims> {
        let (mut needed, mut asides) = ((self.bytes + incoming).saturating_sub(limit), 0);
        while needed > 0 && asides < self.aside.len() {
            needed = needed.saturating_sub(self.aside[asides].1);
            asides += 1;
        }
        let is_superseded = |entry: &Entry| entry.superseded_by.is_some_and(|by| self.entries.contains_key(&by));
        let candidates = self.entries.iter().filter(|(id, _)| !self.pins.contains_key(id));
        let candidates = candidates.map(|(&id, entry)| (id, entry, is_superseded(entry)));
        let snapshots = victims(candidates, needed, now_s)?;
        snapshots.iter().for_each(|&id| self.remove(id));
        let aside: Vec<_> = self.aside.drain(..asides).collect();
        self.bytes -= aside.iter().map(|(_, bytes)| bytes).sum::<u64>();
        Some(Victims { snapshots, aside: aside.into_iter().map(|(path, _)| path).collect() })
    }
}

fn entry(
    (binding, by, kind, tokens, bytes, saved_s, used_s, hits): (&[u8; 32], &[u8; 32], u8, u64, u64, u64, u64, f64),
) -> Option<Entry> {
    let superseded_by = (*by != [0; 32]).then_some(SnapshotId(*by));
    let kind = Kind::from_number(kind)?;
    Some(Entry { binding: *binding, kind, tokens, bytes, saved_s, used_s, hits, superseded_by })
}
