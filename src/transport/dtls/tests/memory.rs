//! What a session costs.

use super::*;

/// Resident memory of this process.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Prints what an idle session takes, and a handshake that the device does not go on
/// with. Alone in its process, or the figure is of all:
/// `cargo test --lib -- --ignored --nocapture idle_sessions`.
#[test]
#[ignore = "measures the whole process"]
fn idle_sessions_are_small() {
    const SESSIONS: usize = 5_000;
    let context = context();
    drop(established(&context, Device::new()));
    let before = resident();
    let sessions: Vec<_> = (0..SESSIONS)
        .map(|_| {
            let (mut device, mut session) = established(&context, Device::new());
            assert_alive(&mut device, &mut session);
            assert_eq!(read(&mut session), None);
            assert_eq!(session.next_datagram(), None);
            session
        })
        .collect();
    let each = (resident() - before) / SESSIONS;
    println!("established: {each} bytes each");
    assert!(each < 4 * 1024, "{each}");

    let now = Instant::now();
    let mut gate = Gate::new(context, now).unwrap();
    let before = resident();
    let handshakes: Vec<_> = (0..SESSIONS / 10)
        .map(|_| {
            let hello = Device::new().hello(&mut gate, now, address(1));
            gate.offer(now, address(1), &hello)
        })
        .collect();
    let each = (resident() - before) / handshakes.len();
    println!("handshaking: {each} bytes each");
    assert_eq!(sessions.len(), SESSIONS);
}

/// Prints what a shard spends on strangers, and on a device.
#[test]
#[ignore = "measures time"]
fn what_datagrams_cost() {
    let context = context();
    let now = Instant::now();
    let mut gate = Gate::new(context.clone(), now).unwrap();
    let mut device = Device::new();
    device.go_on();
    let hello = device.next_datagram().unwrap();
    let time = |what: &str, count: u32, work: &mut dyn FnMut()| {
        let start = Instant::now();
        (0..count).for_each(|_| work());
        println!("{what}: {:?}", start.elapsed() / count);
    };
    time("garbage", 100_000, &mut || {
        assert!(matches!(
            gate.offer(now, address(1), &[0x5a; 100]),
            Offer::Ignored
        ));
    });
    time("hello without cookie", 100_000, &mut || {
        assert!(matches!(
            gate.offer(now, address(1), &hello),
            Offer::Answer(_)
        ));
    });
    let hello = Device::new().hello(&mut gate, now, address(1));
    time("hello with cookie", 1_000, &mut || {
        assert!(matches!(
            gate.offer(now, address(1), &hello),
            Offer::Accepted(_)
        ));
    });
    let (mut device, mut session) = established(&context, Device::new());
    let message = [7; 100];
    time("message out", 100_000, &mut || {
        session.write(&message).unwrap();
        session.next_datagram().unwrap();
    });
    let datagrams: Vec<_> = (0..100_000).map(|_| device.message(&message)).collect();
    let mut datagrams = datagrams.iter();
    let mut buffer = vec![0; MAX_MESSAGE];
    time("message in", 100_000, &mut || {
        session.receive(datagrams.next().unwrap());
        assert_eq!(session.read(&mut buffer), Read::Data(100));
    });
    time("bad record", 100_000, &mut || {
        let mut bad = [0x5a; 120];
        bad[..13].copy_from_slice(&[23, 0xfe, 0xfd, 0, 1, 0, 0x50, 0, 0, 0, 0, 0, 107]);
        session.receive(&bad);
        assert_eq!(session.read(&mut buffer), Read::Pending);
    });
}
