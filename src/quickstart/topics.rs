//! The topics of a device, as its handler and as the broker know them.

/// The user name that every device gets; fills `${username}` of a mountpoint.
pub(super) const USERNAME: &str = "quickstart";

/// Where a device's lines go, without the mountpoint.
pub(super) fn up(clientid: &str) -> String {
    format!("devices/{clientid}/up")
}

/// Where messages for a device come from, without the mountpoint.
pub(super) fn down(clientid: &str) -> String {
    format!("devices/{clientid}/down")
}

/// Which way a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From a device.
    Up,
    /// To a device.
    Down,
}

/// The direction and the client id in a topic on the broker, whatever its
/// mountpoint.
pub(super) fn read(topic: &str) -> Option<(Direction, &str)> {
    let mut levels = topic.rsplit('/');
    let direction = match levels.next()? {
        "up" => Direction::Up,
        "down" => Direction::Down,
        _ => return None,
    };
    let clientid = levels.next()?;
    // A mountpoint need not end with a slash.
    levels.next()?.ends_with("devices").then_some(())?;
    Some((direction, clientid))
}

/// The topics on the broker of a listener's devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Topics {
    mountpoint: String,
}

impl Topics {
    /// `mountpoint` with its placeholders.
    pub(super) fn new(mountpoint: String) -> Self {
        Self { mountpoint }
    }

    pub(super) fn up(&self, clientid: &str) -> String {
        self.filled(clientid) + &up(clientid)
    }

    pub(super) fn down(&self, clientid: &str) -> String {
        self.filled(clientid) + &down(clientid)
    }

    /// Matches the lines of all devices.
    pub(super) fn up_filter(&self) -> String {
        self.filter(&up("+"))
    }

    /// Matches the messages for all devices.
    pub(super) fn down_filter(&self) -> String {
        self.filter(&down("+"))
    }

    fn filled(&self, clientid: &str) -> String {
        self.mountpoint
            .replace("${username}", USERNAME)
            .replace("${clientid}", clientid)
    }

    fn filter(&self, topic: &str) -> String {
        let whole = format!("{}{topic}", self.mountpoint);
        let levels = whole.split('/');
        let wild = levels.map(|level| if level.contains("${") { "+" } else { level });
        wild.collect::<Vec<_>>().join("/")
    }
}

/// The topics by the port that a device reached. Cheap enough to clone.
#[derive(Debug, Clone)]
pub(super) struct Mounts(Vec<(u16, Topics)>);

impl Mounts {
    pub(super) fn new(ports: Vec<(u16, Topics)>) -> Self {
        Self(ports)
    }

    /// The topics of a device that reached `port`.
    pub(super) fn of(&self, port: u16) -> Topics {
        let found = self.0.iter().find(|(listening, _)| *listening == port);
        let found = found.map(|(_, topics)| topics.clone());
        found.unwrap_or_else(|| Topics::new(String::new()))
    }

    /// What to subscribe to for seeing everything.
    pub(super) fn filters(&self) -> Vec<String> {
        let both = |(_, topics): &(u16, Topics)| [topics.up_filter(), topics.down_filter()];
        let mut filters: Vec<_> = self.0.iter().flat_map(both).collect();
        filters.sort();
        filters.dedup();
        filters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountpoints_are_filled_in() {
        let topics = Topics::new("t/x-${clientid}/${username}/".to_owned());
        let up = topics.up("device-1");
        assert_eq!(up, "t/x-device-1/quickstart/devices/device-1/up");
        assert_eq!(topics.down_filter(), "t/+/+/devices/+/down");
        assert_eq!(read(&up), Some((Direction::Up, "device-1")));
    }

    #[test]
    fn topics_are_read_whatever_is_in_front() {
        assert_eq!(read("devices/d/down"), Some((Direction::Down, "d")));
        assert_eq!(read("mydevices/d/up"), Some((Direction::Up, "d")));
        for other in ["", "up", "d/up", "meters/d/up", "devices/d/side"] {
            assert_eq!(read(other), None, "{other:?}");
        }
    }

    #[test]
    fn listeners_with_one_mountpoint_need_one_subscription() {
        let plain = || Topics::new(String::new());
        let mounts = Mounts::new(vec![
            (1, plain()),
            (2, plain()),
            (3, Topics::new("m/".into())),
        ]);
        let filters = mounts.filters();
        assert_eq!(
            filters,
            [
                "devices/+/down",
                "devices/+/up",
                "m/devices/+/down",
                "m/devices/+/up"
            ]
        );
        assert_eq!(mounts.of(3).up("d"), "m/devices/d/up");
        assert_eq!(mounts.of(9), plain());
    }
}
