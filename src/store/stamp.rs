//! What the file system says of a file: enough to see that it changed, without reading it.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{SystemTime, UNIX_EPOCH};

/// The coarsest clock that a file system stamps files with (FAT's), in nanoseconds: two writes that are closer together may leave
/// the same stamp.
const CLOCK_NS: i64 = 2_000_000_000;
/// File systems on which the change time is made up or is the modification time, which anybody can set.
const WITHOUT_CHANGE_TIME: [&str; 5] = ["exfat", "fuse", "fuseblk", "msdos", "vfat"];

/// Size, times and place of a file. Every write moves the change time, and no program can set it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    pub bytes: u64,
    /// Nanoseconds since 1970.
    pub mtime_ns: i64,
    pub ctime_ns: i64,
    pub inode: u64,
    pub device: u64,
}

impl Stamp {
    /// Returns the stamp of a file.
    pub fn of(meta: &Metadata) -> Stamp {
        let nanoseconds = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
        Stamp {
            bytes: meta.len(),
            mtime_ns: nanoseconds(meta.mtime(), meta.mtime_nsec()),
            ctime_ns: nanoseconds(meta.ctime(), meta.ctime_nsec()),
            inode: meta.ino(),
            device: meta.dev(),
        }
    }

    /// Returns true if the file had been left alone for longer than a tick of the coarsest clock when it began to be read. A
    /// write after that leaves another stamp; one before may not have.
    pub fn is_settled(&self, read_from_ns: i64) -> bool {
        self.ctime_ns < read_from_ns.saturating_sub(CLOCK_NS)
    }
}

/// Returns the time now in nanoseconds since 1970.
pub fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Returns the devices whose file systems keep no change time. Where the system lists no mounts there are none.
pub fn devices_without_change_time() -> BTreeSet<u64> {
    devices_in(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// Reads lines such as `25 24 8:1 / /mnt rw,relatime shared:1 - vfat /dev/sda1 rw`.
fn devices_in(mountinfo: &str) -> BTreeSet<u64> {
    let device = |line: &str| {
        let (head, tail) = line.split_once(" - ")?;
        let kind = tail.split(' ').next()?;
        let is_one = WITHOUT_CHANGE_TIME.contains(&kind) || kind.starts_with("fuse.");
        let (major, minor) = head.split(' ').nth(2)?.split_once(':')?;
        is_one.then_some(device_number(major.parse().ok()?, minor.parse().ok()?))
    };
    mountinfo.lines().filter_map(device).collect()
}

/// Puts a device's number together as `stat` gives it.
fn device_number(major: u64, minor: u64) -> u64 {
    ((major & !0xfff) << 32) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12) | (minor & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_settled_once_it_was_left_alone_for_longer_than_a_clock_tick() {
        let stamp = Stamp { bytes: 1, mtime_ns: 0, ctime_ns: 10_000_000_000, inode: 1, device: 1 };
        assert!(!stamp.is_settled(10_000_000_000) && !stamp.is_settled(12_000_000_000));
        assert!(stamp.is_settled(12_000_000_001));
        // A clock that was set back: the file's time lies ahead.
        assert!(!stamp.is_settled(5));
    }

    #[test]
    fn file_systems_that_keep_no_change_time_are_found_by_their_device() {
        let text = "22 27 0:21 / /proc rw,relatime - proc proc rw\n\
                    25 24 8:17 / /mnt/a\\040b rw shared:1 master:2 - vfat /dev/sdb1 rw,fmask=0022\n\
                    26 24 0:300 / /home/x rw - fuse.sshfs host: rw\n\
                    27 24 259:2 / / rw - ext4 /dev/nvme0n1p2 rw\nnonsense\n";
        assert_eq!(devices_in(text), BTreeSet::from([0x811, (300 & !0xff) << 12 | (300 & 0xff)]));
    }

    #[test]
    fn a_device_s_number_is_that_of_stat() {
        let listed = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let dev = std::fs::metadata("/proc").map(|meta| meta.dev()).unwrap_or_default();
        for line in listed.lines().filter(|line| line.split(' ').nth(4) == Some("/proc")).take(1) {
            let (major, minor) = line.split(' ').nth(2).and_then(|pair| pair.split_once(':')).expect("a device");
            assert_eq!(device_number(major.parse().expect("a number"), minor.parse().expect("a number")), dev);
        }
    }
}
