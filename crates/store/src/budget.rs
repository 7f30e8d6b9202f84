//! How much memory this process may still take.
//!
//! The total of the machine says little: a container may have been given a part of it, and other programs hold another.
//! On Linux the answer is the least of what the system estimates it can hand out without swapping (`MemAvailable`) and
//! what is left in each memory cgroup that the process is in, ancestors included, version 2 or 1. Pages of the file cache
//! count as free in all of them: they are given back on demand.

use std::path::{Path, PathBuf};

/// Memory that can be taken, and which authority allows no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available {
    /// Bytes beyond what the process holds now.
    pub bytes: u64,
    /// Bytes that it holds now, of its own: a plan counts them, too.
    pub held_bytes: u64,
    /// The file, or elsewhere the call, that says so.
    pub according_to: PathBuf,
}

/// Memory that this process can take now; `None` where the system does not say.
pub fn available() -> Option<Available> {
    #[cfg(target_os = "macos")]
    return macos::available();
    #[cfg(not(target_os = "macos"))]
    return available_under(Path::new("/"));
}

/// The same by the files of Linux below `root`. What cannot be read or understood there is passed over.
pub fn available_under(root: &Path) -> Option<Available> {
    let meminfo = root.join("proc/meminfo");
    let system = field(&meminfo, "MemAvailable:").map(|kib| (kib * 1024, meminfo));
    let held_bytes = field(&root.join("proc/self/status"), "RssAnon:").unwrap_or(0) * 1024;
    let least = system.into_iter().chain(cgroup_limits(root)).min_by_key(|(bytes, _)| *bytes);
    least.map(|(bytes, according_to)| Available { bytes, held_bytes, according_to })
}

/// A number of a file of `name number …` lines.
fn field(path: &Path, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let mut words = text.lines().map(str::split_whitespace);
    words.find_map(|mut line| (line.next() == Some(name)).then(|| line.next()?.parse().ok())?)
}

/// A file that is one number. `max`, where there is no limit, is none.
fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The two versions of the memory controller, by the names of their files.
struct Controller {
    file_system: &'static str,
    limits: &'static [&'static str],
    used: &'static str,
    /// Pages of the file cache, of the group and those below it.
    cache: [&'static str; 2],
}

const VERSION_2: Controller = Controller {
    file_system: "cgroup2",
    limits: &["memory.max", "memory.high"],
    used: "memory.current",
    cache: ["active_file", "inactive_file"],
};

/// Without a limit, version 1 shows a number near 2^63, which is never the least.
const VERSION_1: Controller = Controller {
    file_system: "cgroup",
    limits: &["memory.limit_in_bytes"],
    used: "memory.usage_in_bytes",
    cache: ["total_active_file", "total_inactive_file"],
};

impl Controller {
    /// Whether a hierarchy is this controller's, by its file system and what a mount or a process says of it.
    fn is_at(&self, file_system: &str, controllers: &str) -> bool {
        let is_named = controllers.split(',').any(|controller| controller == "memory");
        self.file_system == file_system && (file_system == VERSION_2.file_system || is_named)
    }

    /// Bytes left in the group whose files are in `folder`, if it has a limit, and the file that says so.
    fn left_in(&self, folder: &Path) -> impl Iterator<Item = (u64, PathBuf)> {
        let read = |name: &str| number(&folder.join(name));
        let cache = self.cache.iter().filter_map(|name| field(&folder.join("memory.stat"), name)).sum();
        let used = read(self.used).unwrap_or(0).saturating_sub(cache);
        let limits = self.limits.iter().filter_map(|&name| Some((folder.join(name), read(name)?)));
        let left = |(according_to, limit): (PathBuf, u64)| (limit.saturating_sub(used), according_to);
        limits.map(left).collect::<Vec<_>>().into_iter()
    }
}

/// What is left in every memory cgroup of the process that can be seen, from its own up to the mount's root.
fn cgroup_limits(root: &Path) -> Vec<(u64, PathBuf)> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let (mounts, groups) = (read("proc/self/mountinfo"), read("proc/self/cgroup"));
    let mut limits = Vec::new();
    for mount in mounts.lines().filter_map(Mount::parse) {
        for controller in [&VERSION_2, &VERSION_1] {
            if controller.is_at(mount.file_system, mount.options) {
                let top = root.join(mount.point.trim_start_matches('/'));
                let folder = top.join(mount.below(own_group(&groups, controller)));
                let visible = folder.ancestors().take_while(|folder| folder.starts_with(&top));
                limits.extend(visible.flat_map(|folder| controller.left_in(folder)));
            }
        }
    }
    limits
}

/// The path of the process's group in a controller's hierarchy: lines are `number:controllers:path`, and version 2 has
/// no controllers in its.
fn own_group<'a>(groups: &'a str, controller: &Controller) -> &'a str {
    let parse = |line: &'a str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let file_system = if controllers.is_empty() { VERSION_2.file_system } else { VERSION_1.file_system };
        controller.is_at(file_system, controllers).then_some(path)
    };
    groups.lines().find_map(parse).unwrap_or("/")
}

/// A line of `/proc/self/mountinfo` (proc(5)).
struct Mount<'a> {
    /// Which folder of the hierarchy is mounted.
    root: &'a str,
    point: &'a str,
    file_system: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Mount<'a>> {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let mut kind = kind.split(' ');
        let (root, point) = (place.next()?, place.next()?);
        Some(Mount { root, point, file_system: kind.next()?, options: kind.nth(1)? })
    }

    /// A group's folder below the mount point. In a container a group's path may be told as seen from outside; then
    /// only the mount's root is known to hold the process.
    fn below(&self, group: &'a str) -> &'a str {
        let below = if self.root == "/" { Some(group) } else { group.strip_prefix(self.root) };
        let below = below.filter(|rest| (rest.is_empty() || rest.starts_with('/')) && !rest.contains("/.."));
        below.unwrap_or_default().trim_start_matches('/')
    }
}

/// Written to Apple's documentation; no test has run it on a Mac yet.
#[cfg(target_os = "macos")]
mod macos {
    use super::Available;

    /// Free and purgeable pages, and those of the file cache. Inactive anonymous pages are left out: the compressor can
    /// make room of them, but not for memory that is used all the time.
    pub(super) fn available() -> Option<Available> {
        let mut statistics = std::mem::MaybeUninit::<libc::vm_statistics64>::zeroed();
        let mut count = libc::HOST_VM_INFO64_COUNT;
        // SAFETY: the call writes at most `count` integers to `statistics`, which has room for exactly that many, and
        // every bit pattern of its integer fields is valid.
        let statistics = unsafe {
            #[allow(deprecated, reason = "the crate that replaces it would be a dependency for one call")]
            let host = libc::mach_host_self();
            let status =
                libc::host_statistics64(host, libc::HOST_VM_INFO64, statistics.as_mut_ptr().cast(), &mut count);
            (status == libc::KERN_SUCCESS).then(|| statistics.assume_init())?
        };
        // SAFETY: `sysconf` has no preconditions.
        let page_bytes = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
        let pages = [statistics.free_count, statistics.purgeable_count, statistics.external_page_count];
        let bytes = pages.into_iter().map(u64::from).sum::<u64>() * page_bytes;
        Some(Available { bytes, held_bytes: 0, according_to: "host_statistics64".into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    /// Bytes, and the file that says so.
    fn found(files: &[(&str, &str)]) -> Option<(u64, String)> {
        let root = tree(files);
        let available = available_under(root.path())?;
        let file = available.according_to.strip_prefix(root.path()).unwrap().display().to_string();
        Some((available.bytes, file))
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal:  64000000 kB\nMemFree: 1000 kB\nMemAvailable:   32000000 kB\nBuffers: 1 kB\n");
    const UNIFIED: (&str, &str) = (
        "proc/self/mountinfo",
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
         31 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    );
    const SPLIT: (&str, &str) = (
        "proc/self/mountinfo",
        "34 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
         35 31 0:32 /docker/ab /sys/fs/cgroup/memory rw master:9 - cgroup cgroup rw,memory\n",
    );

    #[test]
    fn without_cgroups_the_system_decides() {
        assert_eq!(found(&[MEMINFO]), Some((32_768_000_000, "proc/meminfo".into())));
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[("proc/meminfo", "MemAvailable: lots\n")]), None);
    }

    #[test]
    fn version_2_counts_ancestors_and_leaves_out_the_file_cache() {
        let own = ("proc/self/cgroup", "0::/user.slice/run.scope\n");
        let scope = "sys/fs/cgroup/user.slice/run.scope";
        let file = |name: &str| format!("{scope}/{name}");
        let (max, high, current, stat) =
            (file("memory.max"), file("memory.high"), file("memory.current"), file("memory.stat"));
        let mut files =
            vec![MEMINFO, UNIFIED, own, (&max, "6442450944\n"), (&high, "max\n"), (&current, "5000000000\n")];
        files.push((&stat, "anon 1000000000\nfile 4000000000\nactive_file 1500000000\ninactive_file 2400000000\n"));
        assert_eq!(found(&files), Some((6_442_450_944 - 1_100_000_000, max.clone())));
        files.push(("sys/fs/cgroup/user.slice/memory.max", "max\n"));
        files.push(("sys/fs/cgroup/user.slice/memory.high", "2000000000\n"));
        files.push(("sys/fs/cgroup/user.slice/memory.current", "2100000000\n"));
        assert_eq!(found(&files), Some((0, "sys/fs/cgroup/user.slice/memory.high".into())));
    }

    #[test]
    fn version_1_is_found_where_a_container_sees_it() {
        let limit = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4294967296\n");
        let files = [
            MEMINFO,
            SPLIT,
            ("proc/self/cgroup", "5:cpu:/docker/ab\n4:memory:/docker/ab\n0::/elsewhere\n"),
            limit,
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "3294967296\n"),
            ("sys/fs/cgroup/memory/memory.stat", "total_active_file 400000000\ntotal_inactive_file 600000000\n"),
        ];
        assert_eq!(found(&files), Some((2_000_000_000, limit.0.into())));
        // A path as seen from outside the container: the mount's root still counts.
        let mut outside = files;
        outside[2] = ("proc/self/cgroup", "4:memory:/system.slice/../x\n");
        assert_eq!(found(&outside), Some((2_000_000_000, limit.0.into())));
        // No limit.
        let mut unlimited = files;
        unlimited[3] = (limit.0, "9223372036854771712\n");
        assert_eq!(found(&unlimited), Some((32_768_000_000, "proc/meminfo".into())));
    }

    #[test]
    fn both_versions_at_once_give_the_least() {
        let mounts = format!("{}{}", SPLIT.1, "36 31 0:41 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
        let files = [
            MEMINFO,
            ("proc/self/mountinfo", &mounts),
            ("proc/self/cgroup", "4:memory:/docker/ab/inner\n0::/a\n"),
            ("sys/fs/cgroup/memory/inner/memory.limit_in_bytes", "3000000000\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "5000000000\n"),
            ("sys/fs/cgroup/unified/a/memory.max", "2000000000\n"),
        ];
        assert_eq!(found(&files), Some((2_000_000_000, "sys/fs/cgroup/unified/a/memory.max".into())));
    }

    #[test]
    fn what_the_process_holds_is_told_apart() {
        let root = tree(&[MEMINFO, ("proc/self/status", "VmRSS:\t 9000 kB\nRssAnon:\t    7000 kB\n")]);
        let available = available_under(root.path()).unwrap();
        assert_eq!((available.bytes, available.held_bytes), (32_768_000_000, 7_168_000));
    }

    #[test]
    fn this_machine_says_something() {
        match available() {
            Some(available) => assert!(available.bytes > 0, "{available:?}"),
            None => println!("skipped: this system does not say how much memory is available"),
        }
    }
}
