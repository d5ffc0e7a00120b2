import com.hivemq.embedded.EmbeddedHiveMQ;
import java.nio.file.Files;
import java.nio.file.Path;

/** HiveMQ CE in a folder of its own, for scripts/brokers.sh. Arguments: port, folder. */
public class Broker {
    public static void main(String[] arguments) throws Exception {
        Path folder = Path.of(arguments[1]);
        for (String name : new String[] {"conf", "data", "extensions"}) {
            Files.createDirectories(folder.resolve(name));
        }
        Files.writeString(folder.resolve("conf/config.xml"), "<?xml version=\"1.0\"?>\n<hivemq>"
            + "<listeners><tcp-listener><port>" + arguments[0] + "</port>"
            + "<bind-address>127.0.0.1</bind-address></tcp-listener></listeners>"
            + "<anonymous-usage-statistics><enabled>false</enabled></anonymous-usage-statistics>"
            + "</hivemq>");
        EmbeddedHiveMQ broker = EmbeddedHiveMQ.builder()
            .withConfigurationFolder(folder.resolve("conf"))
            .withDataFolder(folder.resolve("data"))
            .withExtensionsFolder(folder.resolve("extensions"))
            .build();
        broker.start().join();
        Thread.currentThread().join();
    }
}
