import io.moquette.broker.Server;
import io.moquette.broker.config.MemoryConfig;
import java.util.Properties;

/** Moquette in a folder of its own, for scripts/brokers.sh. Arguments: port, folder. */
public class Broker {
    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        properties.setProperty("host", "127.0.0.1");
        properties.setProperty("port", arguments[0]);
        properties.setProperty("allow_anonymous", "true");
        properties.setProperty("persistence_enabled", "true");
        properties.setProperty("data_path", arguments[1] + "/");
        properties.setProperty("telemetry_enabled", "false");
        // Else it ends the connection upon a message larger than 8 KiB.
        properties.setProperty("netty.mqtt.message_size", "1048576");
        Server server = new Server();
        server.startServer(new MemoryConfig(properties));
        Runtime.getRuntime().addShutdownHook(new Thread(server::stopServer));
        Thread.currentThread().join();
    }
}
