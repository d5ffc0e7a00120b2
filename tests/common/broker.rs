//! Mosquitto, one process for each test.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::{Peer, free_port, within};

/// The last line of a log.
const ENDED: &str = "(the broker has ended)";

/// A Mosquitto with a port, a folder and a log of its own.
pub struct Broker {
    pub port: u16,
    plain: u16,
    pub dir: TempDir,
    extra: String,
    quiet: bool,
    child: Option<Child>,
    reader: Option<thread::JoinHandle<()>>,
    log: watch::Sender<Vec<String>>,
}

impl Broker {
    /// A broker that takes everything.
    pub async fn start() -> Self {
        Self::with("allow_anonymous true\n").await
    }

    /// A broker with these lines in its configuration, `{dir}` being its folder.
    pub async fn with(extra: &str) -> Self {
        let mut broker = Self::absent(extra);
        broker.up().await;
        broker
    }

    /// A broker that is not there yet.
    pub fn absent(extra: &str) -> Self {
        Self {
            port: free_port(),
            plain: free_port(),
            dir: TempDir::new().unwrap(),
            extra: extra.to_owned(),
            quiet: false,
            child: None,
            reader: None,
            log: watch::Sender::new(Vec::new()),
        }
    }

    /// Keeps sessions over a restart, as they were at the last [`Broker::save`].
    pub const PERSISTENT: &str = "allow_anonymous true\npersistence true\n\
        persistence_location {dir}/\n";

    /// Writes its sessions to disk.
    pub async fn save(&self) {
        let saving = "Saving in-memory database";
        let before = self.counted(saving).await;
        let id = self.child.as_ref().unwrap().id().to_string();
        let sent = Command::new("kill").args(["-USR1", &id]).status();
        assert!(sent.unwrap().success());
        self.logged_times(saving, before + 1).await;
        // It says so before it does so: what it answers now comes after.
        drop(Peer::connect(self.port).await);
    }

    /// A broker that takes everything but what is below `forbidden/`, to publish or
    /// to subscribe.
    pub async fn limited() -> Self {
        let plugin = dynamic_security();
        let mut broker = Self::absent(&format!(
            "allow_anonymous true\nplugin {plugin}\nplugin_opt_config_file {{dir}}/roles.json\n"
        ));
        let deny = |kind: &str, topic: &str| {
            format!(r#"{{"acltype":"{kind}","topic":"{topic}","priority":0,"allow":false}}"#)
        };
        let denied = [
            deny("publishClientSend", "forbidden/#"),
            deny("subscribePattern", "forbidden/#"),
            deny("subscribePattern", "$share/+/forbidden/#"),
        ];
        let roles = format!(
            r#"{{"defaultACLAccess":{{"publishClientSend":true,"publishClientReceive":true,"subscribe":true,"unsubscribe":true}},"clients":[],"groups":[{{"groupname":"all","roles":[{{"rolename":"limited"}}]}}],"roles":[{{"rolename":"limited","acls":[{}]}}],"anonymousGroup":"all"}}"#,
            denied.join(",")
        );
        fs::write(broker.dir.path().join("roles.json"), roles).unwrap();
        broker.up().await;
        broker
    }

    /// A broker that knows these users and their passwords and nobody else; `acl` are the
    /// lines of an `acl_file`.
    pub async fn guarded(users: &[(&str, &str)], acl: &str) -> Self {
        let mut broker =
            Self::absent("allow_anonymous false\npassword_file {dir}/users\nacl_file {dir}/acl\n");
        broker.users(users);
        fs::write(broker.dir.path().join("acl"), acl).unwrap();
        broker.up().await;
        broker
    }

    /// The users of a broker that is guarded, from its next start or `HUP` on.
    pub fn users(&self, users: &[(&str, &str)]) {
        let file = self.dir.path().join("users");
        fs::write(&file, "").unwrap();
        for (name, password) in users {
            let mut command = Command::new("mosquitto_passwd");
            let status = command.arg("-b").arg(&file).args([name, password]).status();
            let made = status.expect("mosquitto_passwd comes with Mosquitto");
            assert!(made.success());
        }
    }

    /// A free port for a second listener.
    pub fn plain(&self) -> u16 {
        self.plain
    }

    /// Logs no packets: for tests with so many that the log would be the bottleneck.
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Sends it a signal, such as `USR1`, upon which it saves what it keeps.
    pub fn signal(&self, name: &str) {
        let id = self.child.as_ref().expect("it runs").id().to_string();
        let status = Command::new("kill")
            .args([&format!("-{name}"), &id])
            .status();
        assert!(status.unwrap().success());
    }

    /// Other lines for its configuration, from the next start on.
    pub fn configure(&mut self, extra: &str) {
        extra.clone_into(&mut self.extra);
    }

    /// Starts it; returns when it listens.
    pub async fn up(&mut self) {
        for _ in 0..20 {
            let Err(lines) = self.try_up().await else {
                return;
            };
            let taken = lines
                .iter()
                .any(|line| line.contains("Address already in use"));
            assert!(taken, "{lines:#?}");
            // Somebody looks whether it is free, or has just left it.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("port {} is taken", self.port);
    }

    /// Starts it; its log, if it ends at once.
    async fn try_up(&mut self) -> Result<(), Vec<String>> {
        self.kill();
        let dir = self.dir.path().display().to_string();
        let config = self.dir.path().join("mosquitto.conf");
        let log = if self.quiet { "information" } else { "all" };
        let text = format!(
            "user root\nlistener {} 127.0.0.1\nlog_dest stderr\nlog_type {log}\n\
             log_timestamp false\nset_tcp_nodelay true\nsys_interval 0\n\
             max_queued_messages 0\n{}",
            self.port,
            self.extra.replace("{dir}", &dir)
        );
        fs::write(&config, text).unwrap();
        self.log.send_replace(Vec::new());
        let mut child = Command::new(mosquitto())
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("mosquitto must be installed");
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = self.log.clone();
        self.reader = Some(thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                log.send_modify(|log| log.push(line));
            }
            log.send_modify(|log| log.push(ENDED.to_owned()));
        }));
        self.child = Some(child);
        let mut log = self.log.subscribe();
        let begun = |line: &String| line.ends_with(" running") || line == ENDED;
        let started = log.wait_for(|log| log.iter().any(begun));
        let lines = within("Mosquitto to start", started).await.unwrap().clone();
        let ended = lines.iter().any(|line| line == ENDED);
        if ended { Err(lines) } else { Ok(()) }
    }

    /// Kills it as a power failure would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // Its log is complete then.
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }

    /// Its log since the last start.
    pub fn lines(&self) -> Vec<String> {
        self.log.borrow().clone()
    }

    /// Waits until the log has everything that the broker did so far: its lines come
    /// through a pipe, later than what it answers.
    pub async fn caught_up(&self) {
        let mark = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))
            .await
            .unwrap();
        let port = mark.local_addr().unwrap().port();
        self.logged(&format!("New connection from 127.0.0.1:{port} "))
            .await;
    }

    /// How many lines of its log contain `part`, with everything it did so far.
    pub async fn counted(&self, part: &str) -> usize {
        self.caught_up().await;
        self.count(part)
    }

    /// How many lines of its log contain `part`, as far as it was read.
    pub fn count(&self, part: &str) -> usize {
        self.log
            .borrow()
            .iter()
            .filter(|l| l.contains(part))
            .count()
    }

    /// Waits for a line that contains `part`.
    pub async fn logged(&self, part: &str) {
        self.logged_times(part, 1).await;
    }

    /// Waits for so many lines that contain `part`.
    pub async fn logged_times(&self, part: &str, times: usize) {
        let mut log = self.log.subscribe();
        let what = format!("{times} times {part:?} in the broker's log");
        let found = |log: &Vec<String>| log.iter().filter(|l| l.contains(part)).count() >= times;
        within(&what, log.wait_for(found)).await.unwrap();
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }
}

/// Debian keeps Mosquitto where only root's PATH looks.
fn mosquitto() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    let files = folders.into_iter().map(|folder| folder.join("mosquitto"));
    let found = files.into_iter().find(|file| file.is_file());
    found.expect("mosquitto is needed: apt-get install mosquitto")
}

/// The plugin with roles, which comes with Mosquitto.
fn dynamic_security() -> String {
    let folders = fs::read_dir("/usr/lib")
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files = folders.map(|folder| folder.join("mosquitto_dynamic_security.so"));
    let found = files.find(|file| file.is_file());
    found.expect("Mosquitto's plugin").display().to_string()
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill();
    }
}
