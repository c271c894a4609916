import com.pixelmed.validate.DicomSRValidator;

/** PixelMed's checker of SR templates for several files: its own program reads one, after six seconds of getting ready. */
public class TemplateChecker {
    public static void main(String[] files) throws Exception {
        DicomSRValidator checker = new DicomSRValidator();
        for (String file : files) {
            System.out.println("== " + file);
            System.out.println(checker.validate(file));
        }
    }
}
